"""An encoder learns a task that can be learned, once, by validation alone.

Shapes: N texts of a split, V classes.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from asnn_goose.config.schema import TrainConfig
from asnn_goose.config.task import FinetuneConfig, TaskConfig
from asnn_goose.data.classification import Example, Task
from asnn_goose.data.labelled_texts import tokenise_texts
from asnn_goose.errors import UserError
from asnn_goose.models.encoder import load_classifier
from asnn_goose.train.class_targets import stored_class_logits
from asnn_goose.train.engine import Engine
from asnn_goose.train.finetune import Finetuned, finetuned
from tests.models.test_encoder import save_bert

QUICK = FinetuneConfig(epochs=3, lr=3e-3, batch_size=8)
SETTINGS = TaskConfig(window=24)


def _task(seed: int = 0) -> Task:
    """Texts of made-up words; the class is the one of two letters that is among them."""
    draw = random.Random(seed)

    def example() -> Example:
        label = draw.randrange(2)
        letters = [*draw.choices("abcdefgh", k=draw.randint(5, 20)), "xy"[label]]
        draw.shuffle(letters)
        return Example("".join(letters), label)

    sizes = {"train": 240, "validation": 60, "test": 60}
    splits = {name: tuple(example() for _ in range(count)) for name, count in sizes.items()}
    return Task("letters", "key", "none", ("with x", "with y"), splits, 0)


@pytest.fixture
def teach(tmp_path, monkeypatch) -> Callable[..., Finetuned]:
    """:func:`finetuned` of a tiny BERT, in a cache of this test's."""
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "cache"))
    folder = save_bert(tmp_path / "bert", hidden_dropout_prob=0.0)

    def teach(task: Task | None = None, config: FinetuneConfig = QUICK, seed: int = 0) -> Finetuned:
        return finetuned(str(folder), task or _task(), SETTINGS, config, seed, _engine())

    return teach


def _engine() -> Engine:
    return Engine(TrainConfig(scale="smoke", tokens=1, device="cpu", precision="float32"))


def test_it_learns_and_what_it_says_is_what_the_kept_model_does(teach):
    found = teach()
    # 60 texts of two classes: chance would reach 0.75 once in 10,000 times.
    assert found.test.accuracy > 0.9 and found.validation.accuracy > 0.9
    accuracies = [epoch.validation_accuracy for epoch in found.epochs]
    assert len(accuracies) == 3 and found.best == accuracies.index(max(accuracies)) + 1
    assert found.validation.accuracy == max(accuracies)
    assert found.epochs[-1].loss < found.epochs[0].loss
    teacher = load_classifier(str(found.folder))
    assert teacher.labels == ("with x", "with y")
    for name, scored in (("validation", found.validation), ("test", found.test)):
        right = 0
        for example in _task().splits[name]:
            batch = teacher.tokenizer(example.text, return_tensors="pt")
            right += int(teacher.logits(batch.input_ids, batch.attention_mask).argmax()) == example.label
        assert scored.accuracy == pytest.approx(right / 60)
    assert found.truncated == {name: 0 for name in ("train", "validation", "test")}


def test_it_happens_once(teach, caplog):
    with caplog.at_level(logging.INFO, "asnn_goose"):
        first = teach()
        assert sum("(once)" in record.getMessage() for record in caplog.records) == 1
        caplog.clear()
        again = teach()
    assert not any("(once)" in record.getMessage() for record in caplog.records)
    assert again.folder == first.folder and again.epochs == first.epochs and again.best == first.best
    assert np.array_equal(again.test.confusion_CC, first.test.confusion_CC)
    others = (teach(seed=1), teach(config=QUICK.model_copy(update={"epochs": 1})), teach(_task(seed=1)))
    assert len({first.folder, *(other.folder for other in others)}) == 4


def test_a_run_draws_the_same_numbers_whether_it_found_the_teacher_or_taught_it(teach):
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        teach(config=QUICK.model_copy(update={"epochs": 1}))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_the_test_split_chooses_nothing(teach):
    task = _task()
    flipped = tuple(replace(example, label=1 - example.label) for example in task.splits["test"])
    first, second = teach(task), teach(replace(task, splits={**task.splits, "test": flipped}))
    assert second.test.accuracy == pytest.approx(1.0 - first.test.accuracy)
    assert second.folder != first.folder
    ours, theirs = (load_file(found.folder / "model.safetensors") for found in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_teacher_that_knows_too_little_is_refused(teach):
    slow = QUICK.model_copy(update={"epochs": 1, "lr": 1e-7, "least_accuracy": 0.95})
    for _ in range(2):  # also when it is found in the cache
        with pytest.raises(UserError, match=r"reaches a validation accuracy of 0.* on task 'letters', below") as error:
            teach(config=slow)
        assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_is_one_sentence(teach):
    with pytest.raises(UserError, match=r"fine-tuning broke down .*: lower"):
        teach(config=QUICK.model_copy(update={"lr": 1e30}))


def test_stored_logits_are_the_teachers_by_row(teach):
    teacher = load_classifier(str(teach().folder))
    texts = tokenise_texts(_task().splits["train"], teacher.tokenizer, SETTINGS.window)
    first = stored_class_logits(teacher, texts, _engine())
    assert first.shape == (240, 2)
    for row in (0, 17, 239):
        ids = torch.from_numpy(texts.ids[row])[None]
        # float32, in a padded batch and alone.
        torch.testing.assert_close(first[row], teacher.logits(ids, torch.ones_like(ids))[0], rtol=0, atol=1e-4)
    teacher.model.classifier.weight.data.zero_()  # read from the store from here on
    assert torch.equal(stored_class_logits(teacher, texts, _engine()), first)
    shorter = tokenise_texts(_task().splits["train"], teacher.tokenizer, 8)
    assert not torch.allclose(stored_class_logits(teacher, shorter, _engine()), first)

"""Students under transformers' own Trainer: micro-batches that are accumulated take the step of the whole batch, and
predictions are the logits alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from asnn_goose.models import GooseClassifierConfig, GooseConfig, GooseForCausalLM, GooseForSequenceClassification

SHAPE: dict[str, Any] = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "head_size": 8}


def _language_model() -> tuple[Any, list[dict[str, Tensor]]]:
    """With rows of 7, 3, 1 and 5 labels that count: a mean of the rows' means is another number."""
    ids_BL = torch.randint(19, (4, 8), generator=torch.Generator().manual_seed(0))
    labels_BL = ids_BL.masked_fill(torch.arange(8) > torch.tensor([[7], [3], [1], [5]]), -100)
    rows = [{"input_ids": ids_L, "labels": labels_L} for ids_L, labels_L in zip(ids_BL, labels_BL, strict=True)]
    return GooseForCausalLM(GooseConfig(**SHAPE)), rows


def _classifier() -> tuple[Any, list[dict[str, Tensor]]]:
    ids_BL = torch.randint(19, (4, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids_L, "labels": torch.tensor(row % 3)} for row, ids_L in enumerate(ids_BL)]
    return GooseForSequenceClassification(GooseClassifierConfig(**SHAPE, num_labels=3)), rows


@pytest.mark.parametrize("make", [_language_model, _classifier])
def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(make, tmp_path: Path):
    steps = []
    for size in (4, 2, 1):
        torch.manual_seed(0)
        model, rows = make()
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1,
            learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        loss = Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss  # pyright: ignore[reportArgumentType]
        steps.append((loss, [p.detach().clone() for p in model.parameters()]))
    (whole, wanted), *others = steps
    for loss, found in others:
        assert loss == pytest.approx(whole, rel=1e-5)
        # float32 sums in another order.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_smoothed_labels_are_the_following_tokens_too(tmp_path: Path):
    """A factor of next to nothing leaves the model's own loss."""
    model, rows = _language_model()
    losses = []
    for factor in (0.0, 1e-7):
        arguments = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
            label_smoothing_factor=factor,
        )  # fmt: skip
        losses.append(Trainer(model=model, args=arguments, eval_dataset=rows).evaluate()["eval_loss"])  # pyright: ignore[reportArgumentType]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("make", [_language_model, _classifier])
def test_predictions_are_the_logits_of_every_row(make, tmp_path: Path):
    model, rows = make()
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": float(len(prediction.predictions))}

    trainer = Trainer(model=model, args=arguments, eval_dataset=rows, compute_metrics=metrics)  # pyright: ignore[reportArgumentType]
    assert trainer.evaluate()["eval_rows"] == 4.0
    found = trainer.predict(rows).predictions  # pyright: ignore[reportArgumentType]
    ids_BL = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        wanted = model.eval()(ids_BL).logits
    assert shapes[0] == (wanted.shape, torch.stack([row["labels"] for row in rows]).shape)
    # Products of other shapes round otherwise.
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-5)

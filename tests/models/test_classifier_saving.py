"""The classifier as a transformers model: saved and loaded, in a pipeline, begun from a language model."""

import re
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from asnn_goose.models import GooseClassifierConfig, GooseConfig, GooseForCausalLM, GooseForSequenceClassification
from asnn_goose.models.goose import GooseModel
from tests.conftest import bytes_tokenizer
from tests.models.test_classifier import LABELS, READINGS, SHAPE, make_classifier


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = bytes_tokenizer()
    tokenizer.pad_token = "<eos>"
    return tokenizer


@pytest.mark.parametrize("reading", READINGS)
def test_a_saved_classifier_comes_back_equal(tmp_path, reading):
    model = make_classifier(reading=reading, exits=[2], neuron={"steps": 3})
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is GooseForSequenceClassification
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.id2label, config.reading, config.exits) == (LABELS, reading, [2])
    assert config.neuron["steps"] == 3


def test_the_pipeline_names_the_classes(tmp_path):
    model = make_classifier()
    model.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    texts = ["wheat", "a longer text about ships", "x"]
    found = pipeline("text-classification", model=str(tmp_path))(texts, batch_size=3)
    for text, answer in zip(texts, found, strict=True):
        with torch.no_grad():
            p_V = model(_tokenizer()(text, return_tensors="pt").input_ids).logits[0].softmax(-1)
        assert answer["label"] == LABELS[int(p_V.argmax())]
        assert answer["score"] == pytest.approx(p_V.max().item(), abs=1e-5)  # float32, padded and not


def test_a_language_model_is_the_start_of_a_classifier(make_student, tmp_path):
    student: GooseForCausalLM = make_student(vocab_size=257)
    student.save_pretrained(tmp_path)
    model: Any = GooseForSequenceClassification.from_pretrained(tmp_path, num_labels=4, exits=[1])
    ours, theirs = student.model.state_dict(), model.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())
    assert model.both_ways[1].forward_share_C.tolist() == [1.0, 0.0] * 16
    assert model.exit_norms[0].get_parameter("weight").tolist() == [1.0] * 32
    assert model.classifiers[0].bias.tolist() == [0.0] * 4 and 0.01 < model.classifiers[0].weight.std() < 0.03
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(again) is GooseForSequenceClassification and again.config.num_labels == 4


def test_the_auto_classes_read_a_language_model_as_what_was_asked_for(make_student, tmp_path):
    student: GooseForCausalLM = make_student(vocab_size=257)
    student.save_pretrained(tmp_path)
    kinds = (
        (AutoModelForCausalLM, GooseForCausalLM),
        (AutoModelForSequenceClassification, GooseForSequenceClassification),
        (AutoModel, GooseModel),
    )
    for auto, kind in kinds:
        model = auto.from_pretrained(tmp_path)
        assert type(model) is kind
        blocks = model if kind is GooseModel else model.model
        theirs = blocks.state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in student.model.state_dict().items())


def test_a_plain_configuration_gives_a_classifier_that_reads_both_ways():
    model = GooseForSequenceClassification(GooseConfig(**SHAPE))
    assert (model.config.reading, model.config.exits, model.config.id2label) == ("bidirectional", [], LABELS)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"reading": "backwards"}, "reading must be bidirectional or last, not 'backwards'"),
        ({"exits": [3]}, "exits must rise within 1..2, the blocks before the last, not [3]"),
        ({"exits": [2, 1]}, "exits must rise within 1..2, the blocks before the last, not [2, 1]"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(keys, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        GooseClassifierConfig(**SHAPE, **keys)


@pytest.mark.parametrize(
    "keys",
    [{"num_labels": 1}, {"problem_type": "regression"}, {"problem_type": "multi_label_classification"}],
    ids=str,
)
def test_what_cross_entropy_does_not_teach_is_refused(keys):
    shape = {key: value for key, value in SHAPE.items() if "label" not in key}
    with pytest.raises(ValueError, match=r"are not for this classifier, .*: set num_labels to 2 or more") as error:
        GooseForSequenceClassification(GooseClassifierConfig(**shape, **{"num_labels": 3, **keys}))
    assert "\n" not in str(error.value) and all(f"{key} {value}" in str(error.value) for key, value in keys.items())
    GooseForSequenceClassification(GooseClassifierConfig(**shape, problem_type="single_label_classification"))

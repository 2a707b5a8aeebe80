"""A classifier's fingerprint holds what can change a number, and nothing else."""

from typing import Any

import pytest

from asnn_goose.config import ClassifierExperiment, classifier_fingerprint, load_classifier_experiment
from asnn_goose.config.keys import keys
from asnn_goose.config.load import CLASSIFIER_RESOLVED, NOT_NUMBERS
from tests.config.test_fingerprint import other_value

RESOLUTION = dict.fromkeys(CLASSIFIER_RESOLVED.values(), "x")
APART: dict[str, Any] = {
    "student.tokenizer": "other",
    "student.width": 128,
    "task.path": "texts.csv",
    "general.data.path": "texts",
    "student.exits": [1],
}
"""Other values of keys whose values are null, or that are bound to others."""
KEYS = keys(ClassifierExperiment)
REFUSED = {"student.neuron.sparsity", "student.hidden_neuron.sparsity"}
"""Keys that a classifier cannot set."""


def _tree(key: str) -> dict[str, Any]:
    """Settings under which the key may have either value."""
    tree: dict[str, Any] = load_classifier_experiment("v17_two_stage", ["--scale", "smoke"]).experiment.model_dump(
        mode="json"
    )
    if key in ("student.tokenizer", "student.width"):
        tree["losses"] |= {"features": 0.0, "embeddings": 0.0}
        tree["student"]["init"] = "none"
        tree.update(general=None)
    if key in ("task.path", "general.data.path"):
        branch: dict[str, Any] = tree["task"] if key == "task.path" else tree["general"]["data"]
        branch |= {"source": "files", "path": "a"}
    if key.endswith(".silence"):
        tree["student"][key.split(".")[1]]["kind"] = "radix"
    if key.endswith(".learn_decay"):
        tree["student"][key.split(".")[1]]["decay"] = 0.9
    return tree


@pytest.mark.parametrize("key", sorted(KEYS.keys() - REFUSED))
def test_fingerprint_sees_each_key_or_leaves_it_out_on_purpose(key: str):
    tree = _tree(key)
    before = ClassifierExperiment.model_validate(tree)
    *branch, leaf = key.split(".")
    inner = tree
    for part in branch:
        inner = inner[part]
    inner[leaf] = APART[key] if key in APART else other_value(inner[leaf], KEYS[key])
    if key in ("task.source", "general.data.source"):
        inner |= {"source": "hub", "path": None}
    after = ClassifierExperiment.model_validate(tree)
    assert before != after
    same = classifier_fingerprint(after, RESOLUTION) == classifier_fingerprint(before, RESOLUTION)
    assert same == (key in NOT_NUMBERS or key in CLASSIFIER_RESOLVED)


def test_what_was_resolved_is_a_classifiers_and_all_of_it_counts():
    assert KEYS.keys() >= CLASSIFIER_RESOLVED.keys()
    experiment = load_classifier_experiment("v17_two_stage", ["--scale", "smoke"]).experiment
    base = classifier_fingerprint(experiment, RESOLUTION)
    for name in RESOLUTION:
        assert classifier_fingerprint(experiment, RESOLUTION | {name: "y"}) != base
        with pytest.raises(ValueError, match=name):
            classifier_fingerprint(experiment, {key: value for key, value in RESOLUTION.items() if key != name})

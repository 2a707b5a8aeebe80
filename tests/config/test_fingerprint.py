"""The fingerprint holds what can change a number, and nothing else."""

from typing import Any

import pytest
import yaml

from asnn_goose.config import Experiment, dump, fingerprint, load_dump, load_experiment
from asnn_goose.config.keys import Key, keys
from asnn_goose.config.load import NOT_NUMBERS, RESOLVED

RESOLUTION = dict.fromkeys(RESOLVED.values(), "x")


def load(*argv: str) -> Experiment:
    return load_experiment("v10", ["--scale", "smoke", "--student", "goose", *argv]).experiment


def other_value(value: Any, key: Key) -> Any:
    """A valid value that differs, for any leaf."""
    choices = [choice for choice in key.choices if choice != str(value)]
    if choices:
        return choices[0] if value is None else type(value)(choices[0])
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 0.9 * value or 0.05
        case str():
            return f"{value}x"
        case [first, *rest]:
            return [0.9 * first, *rest]
        case None:
            return "x" if "text" in key.allowed else 0.5 if key.path.endswith(".sparsity") else 3
    raise TypeError(f"{key.path}: no other value for {value!r}")


REQUIRED: dict[str, dict[str, float]] = {
    "losses": {"weight": 0.3}, "ramp": {"start": 1.5}, "stopping": {}, "curriculum": {}, "transfer": {},
    "annealing": {},
}  # fmt: skip
"""What a branch that is absent needs to exist, by the name of its parent or its own."""


def holding(experiment: Experiment, key: str) -> Experiment:
    """The experiment with every branch on the way to the key."""
    tree = experiment.model_dump(mode="json")
    inner, above = tree, ""
    for part in key.split(".")[:-1]:
        if inner.get(part) is None:
            inner[part] = dict(REQUIRED.get(above) or REQUIRED[part])
        inner, above = inner[part], part
    if key == "distillation.temperature.scope":
        inner["mode"] = "learned"
    if key.endswith(".silence"):
        inner["kind"] = "radix"
    if key.endswith(".learn_decay"):
        inner["decay"] = 0.9
    if key.startswith("student.transfer."):
        tree["student"]["init"] = "layers"
    return Experiment.model_validate(tree)


def changed(experiment: Experiment, key: str) -> Experiment:
    tree = experiment.model_dump(mode="json")
    *branch, leaf = key.split(".")
    inner = tree
    for part in branch:
        inner = inner[part]
    inner[leaf] = other_value(inner[leaf], keys()[key])
    return Experiment.model_validate(tree)


@pytest.mark.parametrize("key", keys())
def test_fingerprint_sees_each_key_or_leaves_it_out_on_purpose(key: str):
    source = ["--data.source=files", "--data.path=a"] if key == "data.path" else ["--data.source=hub"]
    targets = [] if key == "distillation.targets" else ["--distillation.targets=online"]
    experiment = holding(load(*source, *targets), key)
    altered = holding(load("--data.source=asset", *targets), key) if key == "data.source" else changed(experiment, key)
    assert altered != experiment
    same = fingerprint(altered, RESOLUTION) == fingerprint(experiment, RESOLUTION)
    assert same == (key in NOT_NUMBERS or key in RESOLVED)


def test_what_stays_out_is_written_down_twice():
    words = {"version", "parent", "question", "change", "train.scale"}
    looks = {"train.log_every", "train.eval_every", "train.checkpoint_every", "train.wandb", "train.device"}
    looks |= {"train.monitor_gradients", "train.probe_tokens"}
    names = {"teacher.name", "student.tokenizer", "data.source", "data.name", "data.path", "data.text_field"}
    automatic = {"teacher.dtype", "train.precision", "student.wkv_backend"}
    automatic |= {"student.neuron.backend", "student.hidden_neuron.backend"}
    assert words | looks == NOT_NUMBERS
    assert names | automatic == RESOLVED.keys()
    assert keys().keys() >= NOT_NUMBERS | RESOLVED.keys()


def test_how_often_one_looks_matters_to_early_stopping_alone():
    prints = [
        fingerprint(load(f"--train.eval_every={every}", *stopping), RESOLUTION)
        for stopping in ([], ["--train.stopping.patience=5"])
        for every in (7, 8)
    ]
    assert prints[0] == prints[1] and prints[2] != prints[3] and prints[0] != prints[2]


def test_fingerprint_sees_what_was_resolved():
    experiment = load()
    base = fingerprint(experiment, RESOLUTION)
    assert len(base) == 64 and int(base, 16) >= 0
    for name in RESOLUTION:
        assert fingerprint(experiment, RESOLUTION | {name: "y"}) != base
        with pytest.raises(ValueError, match=name):
            fingerprint(experiment, {key: value for key, value in RESOLUTION.items() if key != name})


def test_fingerprint_does_not_depend_on_spelling():
    one = load()
    backwards = {key: value for key, value in reversed(yaml.safe_load(dump(one)).items())}
    text = yaml.safe_dump(backwards, sort_keys=False).replace("init: 2.0", "init: 2").replace("0.7", "7.0e-1")
    assert text != dump(one)
    assert fingerprint(load_dump(text), dict(reversed(RESOLUTION.items()))) == fingerprint(one, RESOLUTION)

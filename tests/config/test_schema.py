"""The schema is closed, honest about its words, and wholly in use."""

import ast
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from asnn_goose.config import ClassifierExperiment, load_experiment
from asnn_goose.config.keys import IDENTITY, flatten, groups, keys
from asnn_goose.config.load import CONFIGS
from asnn_goose.config.losses import Losses
from asnn_goose.config.schema import Experiment, TrainConfig
from asnn_goose.errors import UserError

PACKAGE = Path(__file__).parents[2] / "asnn_goose"


def experiment_tree() -> dict:
    return load_experiment("v10", ["--scale", "smoke"]).experiment.model_dump()


@pytest.mark.parametrize("group", [None, *groups()])
def test_alpha_is_refused_everywhere(group: str | None):
    tree = experiment_tree()
    (tree[group] if group else tree)["alpha"] = 0.5
    with pytest.raises(ValidationError, match="alpha"):
        Experiment.model_validate(tree)


def test_alpha_is_in_no_key():
    assert [path for path in keys() if "alpha" in path] == []


def test_an_experiment_cannot_be_changed_after_it_was_made():
    experiment = Experiment.model_validate(experiment_tree())
    with pytest.raises(ValidationError, match="frozen"):
        experiment.train.lr = 1.0


def test_every_field_is_read_outside_the_configuration():
    """By the name alone, as an attribute or (the neurons' settings are a mapping) as a whole string: a field whose name
    another object shares may slip through."""
    nodes = [
        node
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "config"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    # Of the losses' names each is shown to reach the step by a test of the step.
    every = keys().keys() | keys(ClassifierExperiment).keys()
    names = {part for path in every if path not in IDENTITY for part in path.split(".")} - set(Losses.model_fields)
    # total_steps, which the training loop calls, reads these on its behalf.
    if "total_steps" in read:
        read |= {"tokens", "steps", "length"}
    assert sorted(names - read) == []


def test_every_loss_is_enabled_by_some_configuration():
    enabled = {
        key.split("losses.")[1].split(".")[0]
        for path in CONFIGS.glob("*/*.yaml")
        for key, value in flatten(yaml.safe_load(path.read_text(encoding="utf-8"))).items()
        if "losses." in key and value
    }
    assert enabled == set(Losses.model_fields)


@pytest.mark.parametrize("key", ["train.validation_tokens", "train.test_tokens"])
def test_a_budget_with_nothing_to_predict_is_refused_before_the_run(key: str):
    with pytest.raises(UserError, match=rf"{key} = '1' .*: must be a whole number at least 2"):
        load_experiment("v10", [f"--{key}", "1"])
    assert flatten(load_experiment("v10", [f"--{key}", "2"]).experiment.model_dump())[key] == 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        # 65,536 tokens are 128 steps of 2 * 256, and 65,535 are 127 whole ones.
        ({"tokens": 65_536}, 128),
        ({"tokens": 65_535}, 127),
        ({"tokens": 65_536, "length": 5.0}, 640),
        ({"tokens": 65_536, "length": 0.5}, 64),
        # 5 * 65,535 = 639 * 512 + 507: the multiple is of the tokens, not of the whole steps among them.
        ({"tokens": 65_535, "length": 5.0}, 639),
        ({"tokens": 100 * 512, "length": 0.29}, 29),
        ({"tokens": 512, "length": 0.1}, 1),
        ({"tokens": 65_536, "steps": 100}, 100),
        ({"tokens": 65_536, "steps": 100, "length": 0.29}, 29),
        ({"tokens": 65_536, "steps": 3, "length": 0.1}, 1),
    ],
)
def test_how_many_steps_a_run_has(settings: dict[str, float], steps: int):
    train = TrainConfig.model_validate({"scale": "smoke", "batch_size": 2, **settings})
    assert train.total_steps(256) == steps

"""The schema as dotted keys."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, PositiveFloat

from asnn_goose.config import ClassifierExperiment, Experiment
from asnn_goose.config.keys import Key, flatten, groups, keys, nearest_key
from asnn_goose.config.load import CLASSIFICATION, CONFIGS


class Inner(BaseModel):
    rate: float = Field(ge=0, lt=1)
    folder: Path | None = None


class Terms(BaseModel):
    a: Inner | None = None
    b: Inner


class Outer(BaseModel):
    inner: Inner
    terms: Terms
    mode: Literal["on", "off"]
    scale: PositiveFloat | None
    flag: bool
    sizes: list[int]


def test_keys_are_the_leaves_also_of_branches_that_may_be_null():
    assert list(keys(Outer)) == [
        "inner.rate",
        "inner.folder",
        "terms.a.rate",
        "terms.a.folder",
        "terms.b.rate",
        "terms.b.folder",
        "mode",
        "scale",
        "flag",
        "sizes",
    ]


def test_what_is_allowed_is_said_in_words():
    allowed = {path: key.allowed for path, key in keys(Outer).items()}
    assert allowed["inner.rate"] == "a number at least 0 and below 1"
    assert allowed["inner.folder"] == "a path or null"
    assert allowed["mode"] == "one of on, off"
    assert allowed["scale"] == "a number above 0 or null"
    assert allowed["flag"] == "true or false"
    assert "list[int]" in allowed["sizes"]
    assert Key("x", Annotated[int, Field(gt=2)], "").allowed.startswith("a whole number")


def test_choices_are_the_words_of_a_literal_even_when_optional():
    assert Key("x", Literal["a", "b"] | None, "").choices == ("a", "b")
    assert Key("x", float | None, "").choices == ()


def test_groups_are_the_files_of_an_experiment():
    """Each has a folder below configs/, so that what --help and a pick by name promise is there."""
    for model, folder in ((Experiment, CONFIGS), (ClassifierExperiment, CONFIGS / CLASSIFICATION)):
        folders = {path.name for path in folder.iterdir() if path.is_dir()}
        assert set(groups(model)) == folders - {"experiment", CLASSIFICATION}


def test_every_key_has_a_doc():
    assert [path for path, key in keys().items() if not key.doc.endswith(".")] == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("inner.rat", "inner.rate"),
        ("iner.rate", "inner.rate"),
        ("terms.a.foldr", "terms.a.folder"),
        ("mod", "mode"),
        ("b.folder", "terms.b.folder"),
        ("zzz", None),
    ],
)
def test_nearest_key(given: str, meant: str | None):
    assert nearest_key(given, list(keys(Outer))) == meant


def test_flatten_keeps_everything_but_mappings_as_leaves():
    assert flatten({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": None,
    }

"""Groups, inheritance and flags; the dump and the delta."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asnn_goose.config import (
    Experiment,
    as_arguments,
    delta,
    dump,
    experiment_names,
    is_classifier,
    is_classifier_dump,
    load_classifier_dump,
    load_classifier_experiment,
    load_dump,
    load_experiment,
)
from asnn_goose.config.flags import settable
from asnn_goose.config.keys import flatten
from asnn_goose.config.load import CLASSIFICATION, CONFIGS
from asnn_goose.errors import UserError

FILES = {
    "teacher/tiny": "name: tiny",
    "student/small": "{layers: 2, neuron: {kind: ternary, steps: 4}}",
    "student/large": "{layers: 9}",
    "distillation/kd": "{losses: {ce: {weight: 0.3}, forward_kl: {weight: 0.7}}}",
    "data/text": "{window: 8}",
    "train/smoke": "{tokens: 64, batch_size: 2}",
    "train/cpu": "{tokens: 4096, lr: 1e-4}",
    "experiment/base": (
        "{parent: null, question: q, change: c., teacher: tiny, student: small, distillation: kd, data: text}"
    ),
    "experiment/binary": "{parent: base, question: b, change: d., student: {neuron: {kind: binary}}}",
    "experiment/larger": "{parent: binary, question: l, change: e., student: large}",
    "experiment/colder": (
        "{parent: binary, question: f, change: g., seed: 5, distillation: {temperature: {init: 1}}, train: {lr: 0.5}}"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("repository"), FILES)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "configs"


def load(root: Path, name: str, *argv: str) -> Experiment:
    return load_experiment(name, ["--scale", "smoke", *argv], root).experiment


def complaint(root: Path, name: str, *argv: str) -> str:
    with pytest.raises(UserError) as raised:
        load(root, name, *argv)
    sentence = str(raised.value)
    assert len(sentence.splitlines()) == 1
    return sentence


def test_groups_named_by_a_string_come_from_their_files(root: Path):
    base = load(root, "base")
    assert (base.version, base.parent, base.question, base.change) == ("base", None, "q", "c.")
    assert (base.teacher.name, base.student.layers, base.data.window) == ("tiny", 2, 8)
    assert (base.train.scale, base.train.tokens, base.train.batch_size) == ("smoke", 64, 2)
    losses = base.distillation.losses.present()
    assert {name: loss.weight for name, loss in losses.items()} == {"ce": 0.3, "forward_kl": 0.7}


def test_a_mapping_merges_deeply_over_the_parent(root: Path):
    child = load(root, "binary")
    assert (child.version, child.parent, child.question, child.change) == ("binary", "base", "b", "d.")
    assert (child.student.neuron.kind, child.student.neuron.steps, child.student.layers) == ("binary", 4, 2)


def test_a_string_replaces_what_the_parent_had(root: Path):
    grandchild = load(root, "larger")
    assert grandchild.student.layers == 9
    assert grandchild.student.neuron == type(grandchild.student.neuron)()


def test_deltas_reach_every_group_through_two_parents(root: Path):
    grandchild = load(root, "colder")
    assert (grandchild.seed, grandchild.student.neuron.kind) == (5, "binary")
    assert (grandchild.distillation.temperature.init, grandchild.train.lr, grandchild.train.tokens) == (1.0, 0.5, 64)
    assert grandchild.distillation.losses == load(root, "base").distillation.losses


def test_delta_holds_exactly_what_a_version_changes(root: Path):
    assert delta(load(root, "colder"), load(root, "binary")) == {
        "seed": (0, 5),
        "distillation.temperature.init": (2.0, 1.0),
        "train.lr": (5e-4, 0.5),
    }


def test_flags_come_last_and_are_reported(root: Path):
    argv = ["--train.lr=0.25", "--scale", "cpu", "--seed", "3", "--seed=4", "--distillation.losses.ce.weight", "0"]
    invocation = load_experiment("colder", [*argv, "--student.width", "null"], root)
    assert invocation.overrides == {
        "train.lr": 0.25,
        "seed": 4,
        "distillation.losses.ce.weight": 0.0,
        "student.width": None,
    }
    experiment = invocation.experiment
    assert (experiment.train.lr, experiment.seed, experiment.train.tokens) == (0.25, 4, 4096)
    losses = experiment.distillation.losses.present()
    assert {name: term.weight for name, term in losses.items()} == {"ce": 0, "forward_kl": 0.7}
    assert (invocation.scale, invocation.dry_run, invocation.resume, invocation.run_dir) == ("cpu", False, None, None)


def test_a_picked_file_stands_in_under_the_versions_own_change(root: Path):
    invocation = load_experiment("binary", ["--scale", "smoke", "--student", "large"], root)
    assert (invocation.experiment.student.layers, invocation.experiment.student.neuron.kind) == (9, "binary")
    assert invocation.overrides == {"student": "large"}


def test_a_picked_file_lies_under_a_group_that_no_file_of_the_chain_names(tmp_path: Path):
    inline = FILES["experiment/base"].replace("student: small", "student: {layers: 3}")
    root = write(
        tmp_path, FILES | {"experiment/inline": inline, "student/binary": "{layers: 9, neuron: {kind: binary}}"}
    )
    assert load(root, "inline").student.neuron.kind == "ternary"
    picked = load(root, "inline", "--student", "binary")
    assert (picked.student.layers, picked.student.neuron.kind) == (3, "binary")


def test_off_is_a_word(tmp_path: Path):
    root = write(tmp_path, FILES | {"experiment/v": "{parent: base, question: q, change: c, train: {wandb: off}}"})
    assert load(root, "v").train.wandb == "off"


def test_a_file_that_is_not_utf8_is_one_sentence(tmp_path: Path):
    root = write(tmp_path, FILES)
    (root / "experiment" / "v.yaml").write_bytes(b"question: \xff")
    assert complaint(root, "v") == "configs/experiment/v.yaml: not UTF-8 at byte 10: save it as UTF-8"


def test_default_scale_follows_the_hardware(root: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_experiment("base", [], root).scale == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="no scale named 'gpu'"):
        load_experiment("base", [], root)


@pytest.mark.parametrize(
    ("name", "argv", "sentence"),
    [
        ("bass", (), "no experiment named 'bass'; there is base, binary, colder, larger; did you mean base?"),
        ("base", ("--scale=smok",), "no scale named 'smok' (--scale); there is cpu, smoke; did you mean smoke?"),
        (
            "base",
            ("--student", "lage"),
            "no student named 'lage' (--student); there is large, small; did you mean large?",
        ),
        (
            "base",
            ("--distillation.temperature.low", "7"),
            "distillation.temperature: low (7.0) must be below high (5.0)",
        ),
        ("base", ("--data.source", "files"), "data: path must be given with source files, and only there"),
    ],
)
def test_wrong_names_and_combinations(root: Path, name: str, argv: tuple[str, ...], sentence: str):
    assert complaint(root, name, *argv) == sentence


V = "configs/experiment/v.yaml"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("parent: basic", f"no experiment named 'basic' ({V}: parent); there is .*mean base\\?"),
        ("{parent: base, student: lare}", f"no student named 'lare' ({V}: student); .*mean large\\?"),
        (
            "{parent: base, student: {neurn: {kind: dense}}}",
            f"student.neurn = {{'kind': 'dense'}} ({V}): no such key; student has layers, .*mean student.neuron\\?",
        ),
        (
            "{parent: base, distillation: {losses: {forwad_kl: {weight: 1}}}}",
            f"distillation.losses.forwad_kl.*({V}): no such key; distillation.losses has .*forward_kl\\?",
        ),
        ("{parent: base, trian: {lr: 1}}", f"trian = .*({V}): no such key; .* has version, .*, train; .*mean train\\?"),
        (
            "{parent: base, student: {neuron: {kind: dens}}}",
            f"student.neuron.kind = 'dens' ({V}): must be one of ternary, binary, integer, radix, quantised, dense; "
            ".*mean dense\\?",
        ),
        ("{parent: base, train: {steps: 0}}", f"train.steps = 0 ({V}): must be a whole number above 0 or null"),
        ("{parent: base, student: [1]}", f"student = \\[1\\] ({V}): must be a mapping of keys to values"),
        ("{parent: base, distillation: {losses: 3}}", f"distillation.losses = 3 ({V}): must be a mapping of keys .*"),
        (
            "{parent: base, distillation: {losses: {ce: {weight: null}}}}",
            f"distillation.losses.ce.weight = None ({V}): must be a number at least 0",
        ),
        ("{parent: base, train: cpu}", f"{V}: train = 'cpu': the train group is picked with --scale"),
        ("{parent: base, version: w}", f"{V}: version = 'w': leave it out, the file's name says it"),
        ("{parent: base, question: q, change: null}", f"change = None ({V}): must be text"),
        ("{parent: null, question: q}", f"change is missing ({V})"),
        ("parent: [", f"{V}: not valid YAML in line 1: .*"),
        ("change: 2020-13-45", f"{V}: not valid YAML: month must be in 1..12"),
        (
            "parent: base\nstudent: small\nstudent: {layers: 3}",
            f"{V}: not valid YAML in line 3: the key student stands twice.*",
        ),
        ("{parent: base, train: {lr: true}}", f"train.lr = True ({V}): must be a number above 0"),
        ("{parent: base, seed: true}", f"seed = True ({V}): must be a whole number at least 0 and below .*"),
        ("{parent: base, train: {monitor_gradients: 1}}", f"train.monitor_gradients = 1 ({V}): must be true or false"),
        (
            "{parent: base, train: {length: 1e308}}",
            f"train.length = '1e308' ({V}): must be a number above 0 and at most 1e.06",
        ),
        ("[" * 2000, f"{V}: nested too deeply to be a configuration"),
        ("just words", f"{V}: must be a mapping of keys to values"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, sentence: str):
    if text.startswith("{parent: base") and "change" not in text:
        text = text.replace("{parent: base", "{parent: base, question: q, change: c")
    root = write(tmp_path, FILES | {"experiment/v": text})
    pattern = re.sub(r"([(){}])", r"\\\1", sentence)
    said = complaint(root, "v")
    assert re.fullmatch(pattern, said), said


def test_a_wrong_group_file_is_blamed_for_its_own_value(tmp_path: Path):
    root = write(tmp_path, FILES | {"student/small": "{layers: -2}"})
    expected = "student.layers = -2 (configs/student/small.yaml): must be a whole number above 0 or null"
    assert complaint(root, "binary") == expected


def test_parents_in_a_circle_are_refused(tmp_path: Path):
    root = write(tmp_path, FILES | {"experiment/a": "parent: b", "experiment/b": "parent: a"})
    assert complaint(root, "a") == "configs/experiment/b.yaml: parent a closes a circle: a -> b -> a"


def test_question_and_change_are_not_inherited(tmp_path: Path):
    root = write(tmp_path, FILES | {"experiment/v": "{parent: base, question: own}"})
    assert complaint(root, "v") == "change is missing (configs/experiment/v.yaml)"


# Keys that another one constrains: a random value of one alone would be refused for the sake of the other.
TEMPERATURE = ("mode", "scope", "init", "low", "high", "anchor", "lambda_start", "lambda_end", "ramp.start")
NEURON = ("kind", "silence", "sparsity", "membrane", "base", "steps", "offset", "learn_decay")
CONSTRAINED = {"data.source", "data.path", "distillation.targets"}
CONSTRAINED |= {f"distillation.temperature.{name}" for name in TEMPERATURE}
CONSTRAINED |= {"distillation.balance.mode", "distillation.balance.low", "distillation.balance.high"}
CONSTRAINED |= {"train.optimiser", "train.devices", "student.init", "student.width", "student.layer_map"}
CONSTRAINED |= {f"student.{neuron}.{name}" for neuron in ("neuron", "hidden_neuron") for name in NEURON}
CONSTRAINED |= {"student.channel_mix_width"} | {key for key in settable() if key.startswith("student.transfer.")}
CONSTRAINED |= {key for key in settable() if key.startswith(("distillation.curriculum.", "distillation.losses.cka."))}
CONSTRAINED |= {key for key in settable() if key.endswith((".ramp.begin", ".ramp.end")) or "_relation." in key}


def needed(overrides: Iterable[str]) -> dict[str, float]:
    """What the branches that the overrides reach into cannot do without."""
    terms = {tuple(key.split(".")[:3]) for key in overrides if key.startswith("distillation.losses.")}
    ramps = {key.rpartition(".")[0] for key in overrides if ".ramp." in key}
    return {".".join((*term, "weight")): 0.5 for term in terms} | {f"{ramp}.start": 0.25 for ramp in ramps}


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    finite = st.from_type(annotation).filter(lambda value: value not in (float("inf"), float("-inf")))
    return finite.filter(lambda value: str(value).strip().lower() not in ("null", "~", ""))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_overrides_survive_dump_and_command_line(root: Path, data: st.DataObject):
    free = {path: key for path, key in settable().items() if path not in CONSTRAINED}
    chosen = data.draw(st.sets(st.sampled_from(sorted(free)), min_size=1, max_size=6))
    overrides = {path: data.draw(values_of(free[path].annotation), label=path) for path in chosen}
    overrides |= needed(overrides)
    invocation = load_experiment("base", ["--scale=smoke", *as_arguments(overrides)], root)
    assert invocation.overrides == overrides
    given_values = flatten(invocation.experiment.model_dump())
    assert {path: given_values[path] for path in overrides} == overrides
    assert load_dump(dump(invocation.experiment)) == invocation.experiment
    again = load_experiment("base", ["--scale=smoke", *as_arguments(invocation.overrides)], root)
    assert again == invocation


def test_a_dump_with_a_wrong_value_names_its_file(root: Path):
    text = dump(load(root, "base")).replace("layers: 2", "layers: two")
    with pytest.raises(
        UserError, match=r"student.layers = 'two' \(runs/x/config.yaml\): must be a whole number above 0"
    ):
        load_dump(text, "runs/x/config.yaml")


@pytest.mark.parametrize("scale", ["smoke", "ladder", "cpu", "gpu"])
@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_loads_at_every_scale(name: str, scale: str):
    invocation = load_experiment(name, ["--scale", scale])
    assert (invocation.experiment.version, invocation.scale, invocation.overrides) == (name, scale, {})


def test_every_version_but_the_first_changes_something():
    """But aa: it shows what the table makes of noise alone, and so must be its parent with other seeds."""
    loaded = {name: load_experiment(name, ["--scale", "cpu"]).experiment for name in experiment_names()}
    assert [name for name, own in loaded.items() if own.parent and not delta(own, loaded[own.parent])] == ["aa"]


def test_v11_1_learns_the_temperature_that_v10_fixes():
    v10, v11_1 = (load_experiment(name, ["--scale", "cpu"]).experiment for name in ("v10", "v11_1"))
    assert delta(v11_1, v10) == {"distillation.temperature.mode": ("fixed", "learned")}
    assert v10.distillation.temperature.init == 2.0


@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
@pytest.mark.parametrize("name", experiment_names(CONFIGS / CLASSIFICATION))
def test_every_classifier_loads_at_every_scale_and_changes_something(name: str, scale: str):
    own = load_classifier_experiment(name, ["--scale", scale]).experiment
    assert is_classifier(name) and (own.version, own.train.scale) == (name, scale)
    assert load_classifier_dump(dump(own)) == own and is_classifier_dump(dump(own))
    if own.parent is not None:
        assert delta(own, load_classifier_experiment(own.parent, ["--scale", scale]).experiment)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS).with_suffix(""))
)
def test_every_file_says_what_it_is_and_is_valid_alone(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    if path.parent.name not in ("experiment", "train"):
        argv = ["--scale", "smoke", f"--{path.parent.name}", path.stem]
        if path.is_relative_to(CONFIGS / CLASSIFICATION):
            load_classifier_experiment("v17_two_stage", argv)
        else:
            load_experiment("v10", argv)
    assert isinstance(yaml.safe_load(text), dict)

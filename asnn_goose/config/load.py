"""YAML groups, inheritance and flags -> one Experiment; its dump, its delta from another, and its fingerprint."""

import hashlib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from asnn_goose.config.classifier import ClassifierExperiment
from asnn_goose.config.flags import COMMAND_LINE, Flags, help_text, parse_flags
from asnn_goose.config.keys import IDENTITY, explain, flatten, groups, hint, nearest
from asnn_goose.config.schema import Experiment
from asnn_goose.config.yaml_text import load_yaml
from asnn_goose.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSIFICATION = "classification"
"""Folder of CONFIGS with the groups and versions of classifiers."""
AnyExperiment = Experiment | ClassifierExperiment
E = TypeVar("E", Experiment, ClassifierExperiment)

RESOLVED = {
    "teacher.name": "teacher",
    "teacher.dtype": "teacher_dtype",
    "student.tokenizer": "teacher",
    "student.wkv_backend": "wkv",
    "student.neuron.backend": "lif",
    "student.hidden_neuron.backend": "hidden_lif",
    "data.source": "corpus",
    "data.name": "corpus",
    "data.path": "corpus",
    "data.text_field": "corpus",
    "train.precision": "precision",
}
"""Keys that the fingerprint replaces by what they came to: a name or a folder may hold other bytes tomorrow, and auto
means something else on another machine. A tokenizer that is not an asset's adds what it made of the text."""

CLASSIFIER_RESOLVED = {
    "teacher.name": "teacher",
    "student.tokenizer": "tokens",
    "student.wkv_backend": "wkv",
    "student.neuron.backend": "lif",
    "student.hidden_neuron.backend": "hidden_lif",
    "task.source": "tokens",
    "task.name": "tokens",
    "task.path": "tokens",
    "task.text_field": "tokens",
    "task.label_field": "tokens",
    "task.group_field": "tokens",
    "general.data.source": "general",
    "general.data.name": "general",
    "general.data.path": "general",
    "general.data.text_field": "general",
    "train.precision": "precision",
}
"""The same of a classifier's; tokens is a hash of every token and label of the task."""

NOT_NUMBERS = IDENTITY | {
    "train.scale",
    "train.device",
    "train.monitor_gradients",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.probe_tokens",
    "train.wandb",
}
"""Keys that change no number: words, hardware, and how often something is looked at or saved."""


@dataclass(frozen=True)
class Invocation(Generic[E]):
    """An experiment as the command line asked for it."""

    experiment: E
    overrides: dict[str, Any]
    """Dotted key -> value that a flag set, JSON-ready; a picked group file stands under the group's name."""
    scale: str
    dry_run: bool
    resume: Path | Literal["newest"] | None
    """Folder of the run to go on with, or the newest of this version."""
    run_dir: Path | None
    debug: bool


class _Layer(NamedTuple):
    source: str
    values: dict[str, Any]
    replaces: str | None = None
    """Group whose earlier values this layer drops."""


def experiment_names(root: Path = CONFIGS) -> list[str]:
    """Experiments that have a file."""
    return _names(root / "experiment")


def is_classifier(name: str, root: Path = CONFIGS) -> bool:
    """Whether an experiment's file is among those of classifiers."""
    return (root / CLASSIFICATION / "experiment" / f"{name}.yaml").exists()


def load_experiment(name: str, argv: Sequence[str] = (), root: Path = CONFIGS) -> Invocation[Experiment]:
    """Resolve an experiment of language models: its ancestors from the root on, then its own file, then the flags.

    A group given as a string takes the values of that file and drops what the parent had there; a group given as a
    mapping merges deeply over it. A file picked by a flag takes the place of the file that the experiment names, so the
    version's own changes stay on top of it; dotted flags come last. `--help` prints the keys and leaves with status 0.

    Raises:
        UserError: unknown experiment, group file or key; a value out of range; a cycle or a missing parent.
    """
    return _load(name, argv, root, Experiment)


def load_classifier_experiment(
    name: str, argv: Sequence[str] = (), root: Path = CONFIGS
) -> Invocation[ClassifierExperiment]:
    """:func:`load_experiment` of a classifier, whose files lie in ``classification/`` of ``root``."""
    return _load(name, argv, root / CLASSIFICATION, ClassifierExperiment)


def _load(name: str, argv: Sequence[str], root: Path, schema: type[E]) -> Invocation[E]:
    flags = parse_flags(argv, schema)
    picks = flags.picks if "train" in flags.picks else flags.picks | {"train": _default_scale()}
    layers = _experiment_layers(name, picks, root, groups(schema))
    layers += [_Layer(COMMAND_LINE, _nested(key, value)) for key, value in flags.settings.items()]
    experiment = _validate(layers, schema)
    if flags.help:
        sys.stdout.write(help_text(experiment, _names(root / "train")))
        raise SystemExit(0)
    return Invocation(
        experiment=experiment,
        overrides=_overrides(experiment, flags),
        scale=experiment.train.scale,
        dry_run=flags.dry_run,
        resume=flags.resume,
        run_dir=flags.run_dir,
        debug=flags.debug,
    )


def dump(experiment: AnyExperiment) -> str:
    """YAML that `load_dump` turns back into an equal object."""
    # Not allow_unicode: PyYAML writes U+0085 as it is then, and reads it back as a line's end.
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def load_dump(text: str, source: str = "configuration") -> Experiment:
    """The experiment that `dump` wrote; `source` names the text in an error."""
    return _validate([_Layer(source, _mapping(text, source))], Experiment)


def load_classifier_dump(text: str, source: str = "configuration") -> ClassifierExperiment:
    """:func:`load_dump` of a classifier's experiment."""
    return _validate([_Layer(source, _mapping(text, source))], ClassifierExperiment)


def is_classifier_dump(text: str) -> bool:
    """Whether `dump` wrote it of a classifier's experiment, which alone has a task."""
    return any(line.startswith("task:") for line in text.splitlines())


def delta(experiment: AnyExperiment, parent: AnyExperiment) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two experiments differ -> (the parent's value, the experiment's), None where one has none.

    Question, change and names do not count.
    """
    old, new = (flatten(each.model_dump(mode="json")) for each in (parent, experiment))
    return {
        key: (old.get(key), new.get(key))
        for key in dict.fromkeys([*old, *new])
        if key not in IDENTITY and old.get(key) != new.get(key)
    }


def fingerprint(experiment: Experiment, resolved: Mapping[str, str]) -> str:
    """SHA-256, in hex, of all that can change a run's numbers, as canonical JSON.

    `resolved` gives what the keys of RESOLVED came to: teacher and corpus (hashes of their content), teacher_dtype and
    precision (dtypes), wkv and lif (the kernels that were picked). NOT_NUMBERS stays out; train.devices stays in, since
    it multiplies the batch.
    """
    # How often validation is looked at decides where early stopping strikes, and where a stage may end.
    curriculum = experiment.distillation.curriculum
    watched = experiment.train.stopping is not None or (curriculum is not None and curriculum.rule != "time")
    outside = NOT_NUMBERS - {"train.eval_every"} if watched else NOT_NUMBERS
    return _digest(experiment, outside, RESOLVED, resolved)


def classifier_fingerprint(experiment: ClassifierExperiment, resolved: Mapping[str, str]) -> str:
    """:func:`fingerprint` of a classifier's run; `resolved` gives what the keys of CLASSIFIER_RESOLVED came to."""
    return _digest(experiment, NOT_NUMBERS, CLASSIFIER_RESOLVED, resolved)


def _digest(
    experiment: AnyExperiment, outside: Collection[str], replaced: Mapping[str, str], resolved: Mapping[str, str]
) -> str:
    """Of all settings but those outside, and with what `resolved` says in the place of those replaced."""
    if missing := set(replaced.values()) - set(resolved):
        raise ValueError(f"resolved lacks {', '.join(sorted(missing))}")
    values = flatten(experiment.model_dump(mode="json"))
    settings = {key: value for key, value in values.items() if key not in outside and key not in replaced}
    canonical = json.dumps({"settings": settings, "resolved": dict(resolved)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _experiment_layers(name: str, picks: Mapping[str, str], root: Path, with_files: Sequence[str]) -> list[_Layer]:
    """What an experiment's file, its ancestors' and the group files they name say, earliest first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    visited: list[str] = []
    current, blame = name, ""
    while current is not None:
        if current in visited:
            raise UserError(f"{chain[0][0]}: parent {current} closes a circle: {' -> '.join([*visited, current])}")
        source, values = _read("experiment", current, root, blame, named="version")
        visited.append(current)
        chain.insert(0, (source, values))
        current, blame = values.get("parent"), f" ({source}: parent)"
    # A version's question and change are its own, so its ancestors' are left out.
    layers = [_Layer(source, {key: values[key] for key in IDENTITY if key in values}) for source, values in chain[-1:]]
    layers.append(_group_layer("train", picks["train"], root, " (--scale)"))
    named = {key for _, values in chain for key, value in values.items() if isinstance(value, str)}
    # Where no file of the chain names a group by a file of it, the picked one lies under what they say of its keys.
    layers += [_group_layer(key, picks[key], root, f" (--{key})") for key in with_files if key in picks.keys() - named]
    for source, values in chain:
        for key, value in values.items():
            if key == "train" and isinstance(value, str):
                raise UserError(f"{source}: train = {value!r}: the train group is picked with --scale")
            if key in with_files and isinstance(value, str):
                blame = f" (--{key})" if key in picks else f" ({source}: {key})"
                layers.append(_group_layer(key, picks.get(key, value), root, blame))
            elif key not in IDENTITY:
                layers.append(_Layer(source, {key: value}))
    return layers


def _group_layer(group: str, name: str, root: Path, blame: str) -> _Layer:
    source, values = _read(group, name, root, blame, named="scale" if group == "train" else None)
    return _Layer(source, {group: values}, replaces=group)


def _read(kind: str, name: str, root: Path, blame: str, named: str | None = None) -> tuple[str, dict[str, Any]]:
    """Label and content of one file; `named` is the key that its name stands for. `blame` tells who asked for it."""
    names = _names(root / kind)
    if name not in names:
        noun, known = "scale" if kind == "train" else kind, ", ".join(names) or "none"
        raise UserError(f"no {noun} named {name!r}{blame}; there is {known}{hint(nearest(str(name), names))}")
    source = f"{root.name}/{kind}/{name}.yaml"
    try:
        text = (root / kind / f"{name}.yaml").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    values = _mapping(text, source)
    if named in values:
        raise UserError(f"{source}: {named} = {values[named]!r}: leave it out, the file's name says it")
    return source, {named: name, **values} if named else values


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        values = load_yaml(text)
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply to be a configuration") from error
    except (yaml.YAMLError, ValueError) as error:  # of a date that there is not, yaml lets datetime complain
        line, what = "", " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            line, what = f" in line {error.problem_mark.line + 1}", error.problem
        raise UserError(f"{source}: not valid YAML{line}: {what}") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: must be a mapping of keys to values")
    return values


def _validate(layers: Sequence[_Layer], schema: type[E]) -> E:
    """The layers merged, later over earlier, and checked; the first layer is blamed for what none of them gives."""
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _merged({key: value for key, value in tree.items() if key != layer.replaces}, layer.values)

    def source_of(path: str) -> str:
        while path:
            for layer in reversed(layers):
                if _holds(layer.values, path):
                    return layer.source
            path = path.rpartition(".")[0]
        return layers[0].source

    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise explain(error, source_of, schema) from error


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _holds(tree: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _overrides(experiment: BaseModel, flags: Flags) -> dict[str, Any]:
    values = flatten(experiment.model_dump(mode="json"))
    picked = {group: name for group, name in flags.picks.items() if group != "train"}
    # A loss that is null is not in them at all.
    return picked | {key: values.get(key) for key in flags.settings}


def _default_scale() -> str:
    import torch  # seconds to import, and a given scale needs no look at the hardware

    return "gpu" if torch.cuda.is_available() else "cpu"

"""Command-line flags, typed by jsonargparse against the schema's keys."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from pydantic import BaseModel

from asnn_goose.config.classifier import ClassifierExperiment
from asnn_goose.config.keys import IDENTITY, Key, bad_value, branches, flatten, groups, keys, unknown_key
from asnn_goose.config.schema import Experiment
from asnn_goose.errors import UserError

COMMAND_LINE = "command line"
_SWITCHES = {
    "dry-run": "Resolve and check every setting, open nothing, train nothing.",
    "debug": "Show the traceback of an error.",
    "help": "Show this text and leave.",
}


@dataclass(frozen=True)
class Flags:
    """What a command line said."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> typed value."""
    picks: dict[str, str] = field(default_factory=dict)
    """Group -> name of the file that stands in for the experiment's own; train holds the scale."""
    dry_run: bool = False
    resume: Path | Literal["newest"] | None = None
    run_dir: Path | None = None
    debug: bool = False
    help: bool = False


def settable(model: type[BaseModel] = Experiment) -> dict[str, Key]:
    """Keys that a flag may set: all but those that say what the experiment is, and the scale's name."""
    return {path: key for path, key in keys(model).items() if path not in IDENTITY | {"train.scale"}}


def parse_flags(argv: Sequence[str], model: type[BaseModel] = Experiment) -> Flags:
    """Read flags; the last of two that name the same key counts. A branch that may be null can be set to null.

    Raises:
        UserError: unknown key, a value of the wrong type or out of range, a flag without its value, a stray word.
    """
    known, optional = settable(model), branches(model)
    picks = {"scale": "train"} | {group: group for group in groups(model) if group != "train"}
    found: dict[str, Any] = {"settings": {}, "picks": {}}
    for name, given in _split(argv):
        if name in _SWITCHES:
            if given is not None:
                raise UserError(f"--{name} = {given!r} ({COMMAND_LINE}): takes no value")
            found[name.replace("-", "_")] = True
        elif name == "resume":
            found["resume"] = Path(given).expanduser() if given else "newest"
        elif name in ("train", "train.scale"):
            raise UserError(f"--{name} ({COMMAND_LINE}): the train group is picked with --scale")
        elif name in optional and given == "null":
            settings = {key: value for key, value in found["settings"].items() if not key.startswith(f"{name}.")}
            found["settings"] = settings | {name: None}
        elif name not in known and name not in picks and name != "run-dir":
            candidates = [*known, *picks, "run-dir", "resume", *_SWITCHES]
            raise unknown_key(name, given, COMMAND_LINE, candidates)
        elif given is None:
            raise UserError(f"--{name} ({COMMAND_LINE}): needs a value, as in --{name} VALUE")
        elif name == "run-dir":
            found["run_dir"] = Path(given).expanduser()
        elif name in picks:
            found["picks"][picks[name]] = given
        else:
            found["settings"][name] = _typed(_parser(model), known[name], given)
    return Flags(**found)


@cache
def _parser(model: type[BaseModel]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    for key in settable(model).values():
        parser.add_argument(f"--{key.path}", type=key.annotation)
    return parser


def as_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as the arguments that give them again, one `--key=value` each."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def help_text(experiment: Experiment | ClassifierExperiment, scales: Sequence[str]) -> str:
    """Every flag with its doc and what it allows; in the place of its value stands the one in `experiment`."""
    parser = argparse.ArgumentParser(
        usage=f"python experiments/{experiment.version}.py [--key value | --key=value] ...",
        description=f"{experiment.question} {experiment.change} Below, each key stands with its present value.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=48),
        add_help=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--scale", metavar="|".join(scales), help="How long to train; gpu with a GPU, else cpu.")
    run.add_argument("--run-dir", metavar="DIR", help="Folder that the run writes to.")
    run.add_argument("--resume", nargs="?", metavar="DIR", help="Go on with the run in DIR, or with the newest one.")
    for name, doc in _SWITCHES.items():
        run.add_argument(f"--{name}", action="store_true", help=doc)
    values, model = flatten(experiment.model_dump(mode="json")), type(experiment)
    sections = {group: parser.add_argument_group(group) for group in groups(model)}
    folder = "configs/classification" if isinstance(experiment, ClassifierExperiment) else "configs"
    for group in sections.keys() - {"train"}:
        sections[group].add_argument(f"--{group}", metavar="NAME", help=f"Start from {folder}/{group}/NAME.yaml.")
    for key in settable(model).values():
        value = values[key.path] if isinstance(values.get(key.path), str) else json.dumps(values.get(key.path))
        section = sections.get(key.path.partition(".")[0], run)
        section.add_argument(f"--{key.path}", metavar=value, help=f"{key.doc} ({key.allowed})".replace("%", "%%"))
    for path, doc in branches(model).items():
        section = sections.get(path.partition(".")[0], run)
        section.add_argument(f"--{path}", metavar="null", help=f"Leave it out: {doc}".replace("%", "%%"))
    return parser.format_help()


def _split(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Pairs of flag and raw value. A word that starts with -- is never the value of the flag before it; use = there."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} ({COMMAND_LINE}): stray word; every setting is given as --key value")
        name, equals, value = word[2:].partition("=")
        if equals:
            yield name, value
        elif name not in _SWITCHES and words and not words[0].startswith("--"):
            yield name, words.pop(0)
        else:
            yield name, None


def _typed(parser: ArgumentParser, key: Key, given: str) -> Any:
    """One flag at a time, since a parser's own error names the culprit in prose alone."""
    try:
        return parser.parse_args([f"--{key.path}={given}"], defaults=False)[key.path]
    except argparse.ArgumentError as error:
        raise bad_value(key, given, COMMAND_LINE) from error

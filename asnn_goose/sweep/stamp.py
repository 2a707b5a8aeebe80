"""What a table was made from, which its last line says in a comment, so that it is made again when that changes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from asnn_goose.config import Experiment, dump
from asnn_goose.reporting.run_folder import RECORDS

_OPENING, _CLOSING = "<!-- made from ", " -->"


class Stamp(NamedTuple):
    """A request of a table, and the digest of what answers it."""

    scale: str
    versions: tuple[str, ...]
    """Beyond those that every table has."""
    overrides: tuple[str, ...]
    """Flags that every version was run with."""
    records: str
    """:func:`records_digest`."""

    def comment(self) -> str:
        """One line of markdown that is not shown."""
        # An angle bracket of a flag could end the comment.
        return _OPENING + json.dumps(self._asdict()).replace(">", "\\u003e") + _CLOSING


def records_digest(reports: Path, asked: Mapping[str, Experiment], versions: Sequence[str]) -> str:
    """Hexadecimal sha256 of the configurations that are asked for and of the records of the versions."""
    digest = hashlib.sha256()
    for version in versions:
        digest.update(f"{version}\n{dump(asked[version]) if version in asked else ''}\n".encode())
        for folder in sorted((reports / version).glob("*/")):
            for name in RECORDS:
                if (folder / name).is_file():
                    content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                    digest.update(f"{folder.name}/{name} {content}\n".encode())
    return digest.hexdigest()


def read_stamp(table: Path) -> Stamp | None:
    """The stamp of a table; None where there is no table, none that says what it was made from, or a damaged one."""
    if not table.is_file():
        return None
    try:
        last = table.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
        if not (last.startswith(_OPENING) and last.endswith(_CLOSING)):
            return None
        return TypeAdapter(Stamp).validate_json(last.removeprefix(_OPENING).removesuffix(_CLOSING))
    except (UnicodeDecodeError, ValidationError):
        return None

"""Text of the user's own files, the JSON objects in it, and what may be wrong with a record."""

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from asnn_goose.errors import UserError


def decoded(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start}): save it as UTF-8"
        ) from error


def json_objects(path: Path, wanted: str = "one object") -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, from 1; its object) of a .jsonl file, blank lines left out.

    Args:
        wanted: what a line is to hold, for the error.

    Raises:
        UserError: not UTF-8; a line that is not JSON, or no object.
    """
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not JSON ({error}): mend or remove it") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number} is no JSON object: write {wanted} a line")
            yield number, record


def missing_field(where: str, field: str, key: str, known: Iterable[str]) -> UserError:
    """The error of a record or table at ``where`` that lacks ``field``, which the configuration's ``key`` names."""
    known = list(known)
    near = difflib.get_close_matches(field, known, n=1) or known
    return UserError(
        f"{where} has no field {field!r}: set {key} to {' or '.join(map(repr, near))}"
        if known
        else f"{where} has no fields at all: give records with a field {field!r}"
    )


def require_encodable(where: str, field: str, text: str) -> None:
    """Raise UserError for half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a surrogate pair in field {field!r}: mend or drop the record") from None

"""The base of every record, and how a result.json is read and checked."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from asnn_goose.errors import UserError


class Record(BaseModel):
    """Immutable, and closed against unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunRecord(Record):
    """What every result.json begins with."""

    run_id: str
    """Name of the run's folder."""
    version: str
    """Experiment."""
    parent: str | None
    """Version that this one changes."""
    seed: int
    """Seed of initialisation and data order."""
    fingerprint: str
    """Digest of every setting that can change the numbers."""
    scale: str
    """Name of the train group."""
    started: AwareDatetime
    """Begin of the run."""
    steps: int = Field(gt=0)
    """Optimiser steps."""
    precision: str | None = None
    """Of the matrix products in training: bfloat16 or float32; None in records from before it was kept."""

    @property
    def age(self) -> tuple[AwareDatetime, str]:
        """Sorts runs, the oldest first."""
        return self.started, self.run_id


R = TypeVar("R", bound=Record)


def read_result(path: Path, schema: type[R]) -> R:
    """Read a ``result.json`` as what a run of one kind measured.

    Raises:
        UserError: the file is missing or cannot be read, is not JSON, does not have the fields of `schema`, or holds a
            non-finite number.
    """
    try:
        result = schema.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the run did not finish; continue it with --resume.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend or remove it.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its text"
        raise UserError(f"{path} is not the result of a run: {place}: {first['msg']}; repeat the run.") from None
    if bad := _non_finite(result):
        raise UserError(f"{path} holds what is no number ({', '.join(bad)}): repeat the run.")
    return result


def refuse_non_finite(result: Record, run_id: str) -> None:
    """Raise UserError that names every NaN or infinity, since JSON has neither."""
    if bad := _non_finite(result):
        raise UserError(
            f"result.json of {run_id} cannot be written: {', '.join(bad)}; "
            "look at loss and grad_norm in metrics.jsonl, then lower --train.lr."
        )


def _non_finite(result: Record) -> list[str]:
    leaves = _leaves(result.model_dump())
    return [f"{name} is {value}" for name, value in leaves if isinstance(value, float) and not math.isfinite(value)]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))

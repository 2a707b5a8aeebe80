"""The folder of one run: what is written there, and how it survives a crash, a resume and a full disk."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from asnn_goose.config import AnyExperiment
from asnn_goose.errors import UserError
from asnn_goose.reporting.metrics import metrics_line, read_metrics
from asnn_goose.reporting.provenance import REPOSITORY, Provenance, Resumption, code_version
from asnn_goose.reporting.record import Raster
from asnn_goose.reporting.record_base import Record, refuse_non_finite

RECORDS = ("config.yaml", "provenance.json", "metrics.jsonl", "result.json")
"""What a report is made from, beside the raster that result.json may name."""
E = TypeVar("E", bound=AnyExperiment)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it goes and `path` stays.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_errors(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into a UserError: a full disk, a folder that is not writable."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"The disk is full ({error.strerror}) at {path}: free some space, then give the same command again, "
                "for a run of its own with --resume; what was written before is intact."
            ) from error
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): set ASNN_GOOSE_RUNS and ASNN_GOOSE_REPORTS, "
            "or --run-dir of a single run, to folders that you may write to."
        ) from error


class RunFolder:
    """``runs/<version>/<run_id>/``: config.yaml, provenance.json, metrics.jsonl, checkpoints/, result.json, raster.npz,
    student/, and wandb/ where it is tracked there.

    Files are replaced whole; metrics.jsonl grows by whole lines. In data-parallel training only rank 0 holds one.
    """

    def __init__(self, path: Path, provenance: Provenance):
        self.path = path
        self.provenance = provenance

    @classmethod
    def create(
        cls,
        runs_root: Path,
        experiment: AnyExperiment,
        config_yaml: str,
        provenance: Provenance,
        path: Path | None = None,
    ) -> "RunFolder":
        """Make a new folder under `runs_root`, or at `path` (``--run-dir``), with its configuration and provenance.

        Raises:
            UserError: `path` holds a run already, or nothing can be written there.
        """
        if path is None:
            parent = runs_root / experiment.version
            path, copies = parent / provenance.run_id, 1
            while path.exists():
                copies += 1
                path = parent / f"{provenance.run_id}-{copies}"
            provenance = provenance.model_copy(update={"run_id": path.name})
        elif (path / "provenance.json").exists():
            raise UserError(f"--run-dir {path} holds a run already: continue it with --resume, or name another folder.")
        with write_errors(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        folder = cls(path, provenance)
        write_text(folder.config, config_yaml)
        folder._write_provenance()
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run, finished or not.

        Raises:
            UserError: there is none at `path`.
        """
        return cls(path, load_provenance(path))

    @property
    def run_id(self) -> str:
        return self.provenance.run_id

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def student(self) -> Path:
        return self.path / "student"

    def log(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl; on failure the file keeps its former whole lines.

        Raises:
            UserError: the disk is full.
        """
        line = metrics_line(step, values).encode()
        with write_errors(self.metrics), self.metrics.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                # A full disk first shows as a short write; only the next attempt raises.
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(size)
                raise

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within it no other process trains here; the system ends the claim of one that is killed.

        Raises:
            UserError: one does.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path} is being trained by another process: wait for it, or stop it.") from None
            # What a process that was killed while it wrote has left behind.
            for part in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
                part.unlink(missing_ok=True)
            yield
        finally:
            os.close(descriptor)

    def resume(self, step: int) -> None:
        """Continue after `step` optimiser steps: cut later (and torn) metrics lines, and note the session."""
        lines = read_metrics(self.metrics) if self.metrics.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        write_text(self.metrics, "".join(metrics_line(line.pop("step"), line) for line in kept))
        commit, dirty = code_version(REPOSITORY)
        session = Resumption(step=step, time=datetime.now(UTC).replace(microsecond=0), commit=commit, dirty=dirty)
        self.provenance = self.provenance.model_copy(update={"resumed": (*self.provenance.resumed, session)})
        self._write_provenance()

    def write_raster(self, layer: int, site: str, tokens: list[str], spikes: np.ndarray) -> Raster:
        """Keep one sentence's spikes [tokens * steps, channels], micro-steps innermost, each -1, 0 or 1."""
        raster = Raster(layer=layer, site=site)
        with replacing(self.path / raster.file) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, tokens=np.array(tokens, dtype=np.str_), spikes=spikes.astype(np.int8))
        return raster

    def write_result(self, result: Record) -> Path:
        """Write result.json, which marks the run as finished.

        Raises:
            UserError: a number is not finite (named by its path), or the disk is full.
        """
        refuse_non_finite(result, self.run_id)
        write_text(self.result, result.model_dump_json(indent=2) + "\n")
        return self.result

    def _write_provenance(self) -> None:
        write_text(self.path / "provenance.json", self.provenance.model_dump_json(indent=2) + "\n")


def read_config(run_folder: Path) -> str:
    """Text of ``config.yaml``.

    Raises:
        UserError: it is missing or no text.
    """
    config = run_folder / "config.yaml"
    try:
        return config.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{config} does not exist: put it back, or name the folder of a run.") from None
    except OSError as error:
        raise UserError(f"{config} cannot be read ({error.strerror}): mend or remove it.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{config} is damaged ({error}): repeat the run.") from None


def read_experiment(run_folder: Path, parse: Callable[[str, str], E]) -> E:
    """The experiment in ``config.yaml``; ``parse`` is load_dump or load_classifier_dump of :mod:`asnn_goose.config`.

    Raises:
        UserError: what :func:`read_config` raises; it is no experiment of that kind.
    """
    return parse(read_config(run_folder), str(run_folder / "config.yaml"))


def load_provenance(run_folder: Path) -> Provenance:
    """Read ``provenance.json``.

    Raises:
        UserError: there is none, it cannot be read, or it does not have the fields of `Provenance`.
    """
    path = run_folder / "provenance.json"
    try:
        return Provenance.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{run_folder} holds no run (provenance.json is missing): name a run's folder.") from None
    except NotADirectoryError:
        raise UserError(f"{run_folder} is a file: name the folder of a run.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend or remove it.") from None
    except ValidationError as error:
        raise UserError(f"{path} is not readable ({error.errors()[0]['msg']}): start a new run.") from None

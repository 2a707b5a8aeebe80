"""Where a run's numbers come from: code, command, libraries and machine."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import AwareDatetime

from asnn_goose.config import AnyExperiment, as_arguments
from asnn_goose.reporting.record import Record

LIBRARIES = ("torch", "transformers", "lightning-fabric", "numpy", "numba", "einops", "datasets", "safetensors")
REPOSITORY = Path(__file__).resolve().parents[2]


class Hardware(Record):
    """The machine."""

    cpu: str
    """Model of the processor."""
    cores: int
    """Processor cores that this process may use."""
    memory_bytes: int
    """Main memory in bytes."""
    gpu: str | None = None
    """Model of the accelerator, if one was used."""
    threads: int | None = None
    """Threads of a product on the processor, whose number decides the order of sums; None in records from before."""


class Resumption(Record):
    """A later session that continued the run from a checkpoint."""

    step: int
    """Optimiser steps that were already done."""
    time: AwareDatetime
    """Begin of the session."""
    commit: str | None
    """Commit of the code, None outside a git repository."""
    dirty: bool | None
    """Whether code or configuration differed from that commit."""


class Provenance(Record):
    """Contents of ``provenance.json``."""

    run_id: str
    """UTC time, seed and the fingerprint's first digits."""
    started: AwareDatetime
    """Begin of the run."""
    fingerprint: str
    """Digest of every setting that can change the numbers."""
    commit: str | None
    """Commit of the code, None outside a git repository."""
    dirty: bool | None
    """Whether code or configuration differed from that commit."""
    argv: tuple[str, ...]
    """Command line as it was given."""
    command: str
    """Command that reproduces the run from the repository's root."""
    overrides: dict[str, Any]
    """Settings given on the command line: dotted key and value."""
    python: str
    """Version of the interpreter."""
    libraries: dict[str, str]
    """Versions of the libraries that can change the numbers."""
    hardware: Hardware
    resumed: tuple[Resumption, ...] = ()


def collect_provenance(
    experiment: AnyExperiment,
    fingerprint: str,
    *,
    argv: Sequence[str],
    overrides: Mapping[str, Any],
    gpu: str | None = None,
    threads: int | None = None,
    started: datetime | None = None,
) -> Provenance:
    """Describe the run that starts now, or at `started` (aware)."""
    started = (started or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
    commit, dirty = code_version(REPOSITORY)
    return Provenance(
        run_id=f"{started:%Y%m%d-%H%M%S}-s{experiment.seed}-{fingerprint[:8]}",
        started=started,
        fingerprint=fingerprint,
        commit=commit,
        dirty=dirty,
        argv=tuple(argv),
        command=reproducing_command(experiment, overrides),
        overrides=dict(overrides),
        python=platform.python_version(),
        libraries=_library_versions(),
        hardware=Hardware(
            cpu=_processor(),
            cores=_usable_cores(),
            memory_bytes=psutil.virtual_memory().total,
            gpu=gpu,
            threads=threads,
        ),
    )


def reproducing_command(experiment: AnyExperiment, overrides: Mapping[str, Any]) -> str:
    """Shell command, with the scale and seed that may have come from a default spelt out."""
    words = ["python", f"experiments/{experiment.version}.py", f"--scale={experiment.train.scale}"]
    words.append(f"--seed={experiment.seed}")
    return shlex.join(words + as_arguments({key: overrides[key] for key in overrides if key != "seed"}))


def code_version(repository: Path) -> tuple[str | None, bool | None]:
    """Commit checked out in `repository`, and whether anything but the generated reports differs from it."""
    commit = _git(repository, "rev-parse", "HEAD")
    if commit is None or _git(repository, "rev-parse", "--show-prefix"):
        return None, None
    changes = _git(repository, "status", "--porcelain", "--", ".", ":(exclude)reports")
    return commit, bool(changes)


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _library_versions() -> dict[str, str]:
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: installed[name] for name in LIBRARIES if name in installed}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

"""The command line: one experiment from flags to report."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from asnn_goose.config import Experiment, Invocation, delta, dump, load_dump, load_experiment
from asnn_goose.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RUNS, REPORTS = ROOT / "runs", ROOT / "reports"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""


def main(experiment_name: str, argv: Sequence[str] | None = None) -> int:
    """Run an experiment; returns the exit status.

    Args:
        experiment_name: a file of configs/experiment, without its ending.
        argv: flags; None: those of the process.

    Mistakes of the user end in one sentence on stderr and status 2; ``--debug`` shows the traceback as well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    _quiet_libraries()
    try:
        invocation = load_experiment(experiment_name, argv)
        _log_to_stderr(invocation.debug)
        if invocation.dry_run:
            print(_plan(invocation))
            return 0
        return _run(invocation, argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2


def _quiet_libraries() -> None:
    """Keep libraries from talking over the progress bar; must precede their import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: a step frees and takes gigabytes, and fresh pages cost a third of it."""
    import ctypes

    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library has no such switch
        return
    mmap_threshold, trim_threshold = -3, -1
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)


def _log_to_stderr(debug: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("asnn_goose")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


def _plan(invocation: Invocation) -> str:
    """What a run would do, without doing it."""
    experiment = invocation.experiment
    train = experiment.train
    per_step = train.batch_size * train.accumulate * train.devices * experiment.data.window
    lines = [
        f"{experiment.version}: {experiment.question}",
        f"change: {experiment.change}",
        f"scale {train.scale}: {train.total_steps(experiment.data.window)} optimiser steps of {per_step} tokens",
    ]
    if experiment.parent is not None:
        parent = load_experiment(experiment.parent, ["--scale", invocation.scale]).experiment
        lines += [f"  {key}: {old} -> {new}" for key, (old, new) in delta(experiment, parent).items()]
    return "\n".join(lines) + "\n\n" + dump(experiment)


def _newest(version: str) -> Path:
    """The unfinished or finished run of a version that was started last."""
    runs = sorted((RUNS / version).glob("*/provenance.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run of {version} under {RUNS / version} to resume: start one without --resume")
    return runs[-1].parent


def _resumed_experiment(invocation: Invocation, path: Path) -> Experiment:
    """The run's own configuration; flags may repeat it but not change it."""
    from asnn_goose.reporting import RunFolder

    folder = RunFolder.open(path)
    own = load_dump(folder.config.read_text(), str(folder.config))
    changed = {
        key: value
        for key, value in delta(invocation.experiment, own).items()
        if key in invocation.overrides or key == "version"
    }
    if changed:
        key, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"{path} was started with {key} = {old} and cannot go on with {new}: drop --{key}, or start a new run"
        )
    return own


def _run(invocation: Invocation, argv: Sequence[str]) -> int:
    # Heavy imports wait until the flags are known to be right.
    print(f"{invocation.experiment.version}: loading libraries", file=sys.stderr, flush=True)
    from asnn_goose.reporting import report_head
    from asnn_goose.train.loop import Interrupted
    from asnn_goose.train.session import run_session

    experiment, resume = invocation.experiment, None
    if invocation.resume is not None:
        resume = _newest(experiment.version) if invocation.resume == "newest" else invocation.resume
        experiment = _resumed_experiment(invocation, resume)
    begun, started = time.monotonic(), datetime.now(UTC)
    try:
        report = run_session(
            experiment,
            argv=["python", f"experiments/{experiment.version}.py", *argv],
            overrides=invocation.overrides,
            runs_root=RUNS,
            reports_root=REPORTS,
            run_dir=invocation.run_dir,
            resume=resume,
            started=started,
        )
    except Interrupted as stop:
        print(
            f"\nstopped; the run is saved. Go on with: python experiments/{experiment.version}.py --resume {stop}",
            file=sys.stderr,
        )
        return INTERRUPTED
    if report is not None:
        print(f"\n{report_head(report)}\n\nreport: {report}  ({time.monotonic() - begun:.0f} s)")
    return 0

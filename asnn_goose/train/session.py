"""One session of a run: start it or take it up again, train, measure, report."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from asnn_goose.config import Experiment, dump
from asnn_goose.reporting import RunFolder, collect_provenance, write_report
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.loop import Interrupted, Recorder, train
from asnn_goose.train.measure import Clock, measure
from asnn_goose.train.memory import keep_freed_memory
from asnn_goose.train.setting import Setting, prepare
from asnn_goose.train.tracking import Tracker

_log = logging.getLogger(__name__)


def run_session(
    experiment: Experiment,
    *,
    argv: Sequence[str],
    overrides: Mapping[str, Any],
    runs_root: Path,
    reports_root: Path,
    run_dir: Path | None,
    resume: Path | None,
    started: datetime,
) -> Path | None:
    """Train and measure; returns the report's path on the main process, None on the others.

    A run that is resumed though it is finished only gets its report again.

    Raises:
        Interrupted: Ctrl-C while or after training, with the run's folder ("" on processes that have none); a
            checkpoint is there.
        UserError: a mistake in configuration, data or surroundings.
    """
    begun = time.monotonic()
    clock = Clock()
    if resume is not None and RunFolder.open(resume).result.exists():
        _log.info("%s is finished; writing its report again", resume)
        return write_report(resume, reports_root, runs_root)
    keep_freed_memory()
    setting: Setting = clock.time("preparation", lambda: prepare(experiment))
    folder: RunFolder | None = None
    progress = Progress()
    if setting.engine.rank == 0:
        if resume is not None:
            folder = RunFolder.open(resume)
        else:
            provenance = collect_provenance(
                experiment,
                setting.fingerprint,
                argv=argv,
                overrides=overrides,
                started=started,
                **setting.engine.machine(),
            )
            folder = RunFolder.create(runs_root, experiment, dump(experiment), provenance, run_dir)
        _log.info("run folder %s", folder.path)
    with folder.claimed() if folder is not None else contextlib.nullcontext():
        if resume is not None:
            progress = checkpoint.load(
                resume / "checkpoints",
                setting.module,
                setting.optimisers.present(),
                setting.parts(),
                setting.fingerprint,
            )
            if folder is not None:
                folder.resume(progress.step)
        before = clock.seconds["training"] = progress.wall_seconds
        mode = experiment.train.wandb if folder is not None else "off"
        tracker = Tracker(
            mode, folder.path if folder else Path(), experiment.version, folder.run_id if folder else "",
            experiment.model_dump(mode="json"),
        )  # fmt: skip
        try:
            validation = clock.time("training", lambda: train(setting, Recorder(folder, tracker), progress))
            setting.engine.barrier()
            if folder is None:
                return None
            _log.info("measuring on test text")
            result = measure(setting, folder, progress, validation, clock, lambda: before + time.monotonic() - begun)
            folder.write_result(result)
            return write_report(folder.path, reports_root, runs_root)
        except (Interrupted, KeyboardInterrupt) as stop:
            if folder is not None and not (folder.checkpoints / checkpoint.NAME).exists():
                raise
            raise Interrupted(folder.path if folder else "") from stop
        finally:
            tracker.finish()

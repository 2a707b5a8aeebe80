"""One session of a classifier's run: start it or take it up again, train, measure, report."""

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from asnn_goose.config import ClassifierExperiment, dump
from asnn_goose.reporting import RunFolder, collect_provenance
from asnn_goose.reporting.classifier_report import write_classifier_report
from asnn_goose.reporting.classifier_table import write_classifier_table
from asnn_goose.train import checkpoint
from asnn_goose.train.checkpoint import Progress
from asnn_goose.train.classifier_loop import parts, train_classifier
from asnn_goose.train.classifier_measure import measure_classifier
from asnn_goose.train.classifier_setting import prepare_classifier
from asnn_goose.train.loop import Interrupted, Recorder
from asnn_goose.train.measure import Clock
from asnn_goose.train.memory import keep_freed_memory
from asnn_goose.train.tracking import Tracker

_log = logging.getLogger(__name__)


def run_classifier_session(
    experiment: ClassifierExperiment,
    *,
    argv: Sequence[str],
    overrides: Mapping[str, Any],
    runs_root: Path,
    reports_root: Path,
    run_dir: Path | None,
    resume: Path | None,
    started: datetime,
) -> Path:
    """Train and measure; returns the report's path.

    A run that is resumed though it is finished only gets its report again.

    Raises:
        Interrupted: Ctrl-C while or after training, with the run's folder; a checkpoint is there.
        UserError: a mistake in configuration, data or surroundings.
    """
    begun, clock = time.monotonic(), Clock()
    if resume is not None and RunFolder.open(resume).result.exists():
        _log.info("%s is finished; writing its report again", resume)
        return _report(resume, reports_root)
    keep_freed_memory()
    setting = clock.time("preparation", lambda: prepare_classifier(experiment))
    progress = Progress()
    if resume is not None:
        folder = RunFolder.open(resume)
    else:
        provenance = collect_provenance(
            experiment, setting.fingerprint, argv=argv, overrides=overrides, started=started, **setting.engine.machine()
        )
        folder = RunFolder.create(runs_root, experiment, dump(experiment), provenance, run_dir)
    _log.info("run folder %s", folder.path)
    with folder.claimed():
        if resume is not None:
            progress = checkpoint.load(
                folder.checkpoints, setting.module, [setting.optimiser], parts(setting), setting.fingerprint
            )
            folder.resume(progress.step)
        before = clock.seconds["training"] = progress.wall_seconds
        tracker = Tracker(
            experiment.train.wandb, folder.path, experiment.version, folder.run_id, experiment.model_dump(mode="json")
        )
        try:
            clock.time("training", lambda: train_classifier(setting, Recorder(folder, tracker), progress))
            _log.info("measuring on test text")
            result = measure_classifier(setting, folder, progress, clock, lambda: before + time.monotonic() - begun)
            folder.write_result(result)
            return _report(folder.path, reports_root)
        except (Interrupted, KeyboardInterrupt) as stop:
            if not (folder.checkpoints / checkpoint.NAME).exists():
                raise
            raise Interrupted(folder.path) from stop
        finally:
            tracker.finish()


def _report(folder: Path, reports_root: Path) -> Path:
    report = write_classifier_report(folder, reports_root)
    write_classifier_table(reports_root)
    return report

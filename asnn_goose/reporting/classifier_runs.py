"""Finished runs of classifiers, and which of them differ in their seed alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from asnn_goose.config import ClassifierExperiment, is_classifier_dump, load_classifier_dump
from asnn_goose.errors import UserError
from asnn_goose.reporting.classifier_record import ClassifierResult, Score
from asnn_goose.reporting.comparison import changed_experiment, contradictions, warn_once
from asnn_goose.reporting.record_base import read_result
from asnn_goose.reporting.run_folder import read_config, read_experiment


class ClassifierRun(NamedTuple):
    """A run, or its records beside its report."""

    folder: Path
    result: ClassifierResult
    experiment: ClassifierExperiment


def load_classifier_run(folder: Path) -> ClassifierRun:
    """Read config.yaml and result.json.

    Raises:
        UserError: one of them is missing or not what it should be.
    """
    experiment = read_experiment(folder, load_classifier_dump)
    return ClassifierRun(folder, read_result(folder / "result.json", ClassifierResult), experiment)


def is_classifier_run(folder: Path) -> bool:
    """Whether config.yaml is there and a classifier's."""
    return (folder / "config.yaml").exists() and is_classifier_dump(read_config(folder))


def recorded_classifiers(reports_root: Path, version: str = "*") -> list[ClassifierRun]:
    """All that lie beside reports, newest first; one that is damaged or misplaced is logged and left out."""
    runs: list[ClassifierRun] = []
    for path in sorted(reports_root.glob(f"{version}/*/result.json")):
        try:
            if is_classifier_run(path.parent):
                runs.append(_in_its_place(load_classifier_run(path.parent)))
        except UserError as error:
            warn_once(f"{error} (left out)")
    return sorted(runs, key=lambda run: run.result.age, reverse=True)


def without_contradictions(runs: Iterable[ClassifierRun]) -> list[ClassifierRun]:
    """Those of whose fingerprint there is no other outcome; the others are logged."""
    runs = list(runs)
    contradicting = {run.folder: run for same in contradictions(runs, _outcome) for run in same}
    for run in contradicting.values():
        fingerprint = run.result.fingerprint[:8]
        warn_once(f"{run.folder} has the fingerprint {fingerprint}, of which there is another outcome too (left out)")
    return [run for run in runs if run.folder not in contradicting]


def _outcome(run: ClassifierRun) -> tuple[Score, Score]:
    return run.result.student.validation, run.result.student.test


def _in_its_place(run: ClassifierRun) -> ClassifierRun:
    if run.folder.parent.name != run.result.version:
        raise UserError(f"{run.folder} calls itself a run of {run.result.version}: put it where it belongs")
    return run


def seeds_alike(runs: Iterable[ClassifierRun]) -> list[tuple[ClassifierRun, ...]]:
    """Groups that differ in nothing but their seed, each seed's newest run, by seed; the largest group comes first.

    Runs of one group had the same fine-tuned teacher: on another machine, or in another precision, another comes out.

    Args:
        runs: newest first; of groups of one size the one with the newest run comes first.
    """
    groups: list[list[ClassifierRun]] = []
    for run in runs:
        home = next((group for group in groups if _alike(group[0], run)), None)
        if home is None:
            groups.append([run])
        elif run.result.seed not in {other.result.seed for other in home}:
            home.append(run)
    groups.sort(key=len, reverse=True)
    return [tuple(sorted(group, key=lambda run: run.result.seed)) for group in groups]


def _alike(one: ClassifierRun, other: ClassifierRun) -> bool:
    return one.result.teacher == other.result.teacher and not changed_experiment(one.experiment, other.experiment)

"""What there is of a member: finished runs and records, runs to resume, contradictions."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from asnn_goose.config import Experiment, fingerprint, load_dump
from asnn_goose.config.keys import flatten
from asnn_goose.config.load import RESOLVED
from asnn_goose.errors import UserError
from asnn_goose.reporting.comparison import FinishedRun, contradictions, finished_runs, outcome
from asnn_goose.reporting.metrics import read_metrics
from asnn_goose.reporting.run_folder import RECORDS, RunFolder, read_experiment
from asnn_goose.sweep.members import Member

CHECKPOINT = "checkpoints/last.pt"
"""In a run's folder, as train/checkpoint.py names it, which takes seconds to import."""


class Places(NamedTuple):
    """Where runs and reports go."""

    runs: Path
    reports: Path

    @property
    def ladder(self) -> Path:
        """Folder of locks and of the workers' logs."""
        return self.runs / ".ladder"

    @property
    def table_lock(self) -> Path:
        """Locked by whoever writes table and page, which belong together."""
        return self.ladder / "roadmap.md"


def asked_fingerprint(experiment: Experiment) -> str:
    """A run's fingerprint as far as it is known before anything is loaded, and its scale, since a table is of one.

    For teacher, text, dtypes and kernels it holds what the configuration says instead of what that comes to. So it is
    there at once, and a run made on another machine has the same.
    """
    values = flatten(experiment.model_dump(mode="json"))
    said: dict[str, dict[str, object]] = {}
    for key, what in RESOLVED.items():
        said.setdefault(what, {})[key] = values.get(key)
    resolved = {what: json.dumps(keys) for what, keys in said.items()}
    return fingerprint(experiment, resolved | {"scale": experiment.train.scale})


def finished(version: str, places: Places) -> dict[str, list[FinishedRun]]:
    """asked_fingerprint -> finished runs of a version, newest first; the records beside reports count too."""
    found: dict[str, list[FinishedRun]] = {}
    for run in finished_runs(version, places.runs, places.reports):
        found.setdefault(asked_fingerprint(run.experiment), []).append(run)
    return found


class Missing(NamedTuple):
    """What is not done of some members."""

    members: list[Member]
    """Those without a finished run."""
    contradictory: dict[str, str]
    """Name of a member -> why its finished runs cannot all be true."""
    unreported: list[str]
    """Versions of which a finished run has no whole record beside a report."""


def missing(members: Sequence[Member], places: Places) -> Missing:
    """Sort out which members are finished."""
    versions = dict.fromkeys(member.version for member in members)
    known = {version: finished(version, places) for version in versions}
    # Two versions may come to the same computation, as v10 and aa with a seed in common do.
    every = [run for groups in known.values() for runs in groups.values() for run in runs]
    reasons = {same[0].result.fingerprint: _contradiction(same) for same in contradictions(every, outcome)}
    found = Missing([], {}, [])
    for member in members:
        runs = known[member.version].get(asked_fingerprint(member.experiment), [])
        if not runs:
            found.members.append(member)
        elif told := [reasons[run.result.fingerprint] for run in runs if run.result.fingerprint in reasons]:
            found.contradictory[member.name] = told[0]
        if member.version not in found.unreported and any(_is_unreported(run, places) for run in runs):
            found.unreported.append(member.version)
    return found


def _is_unreported(run: FinishedRun, places: Places) -> bool:
    """Whether a run has no whole record, or the record no report: a worker died while it drew."""
    if run.folder.parents[1] != places.reports:
        return True
    return not (run.folder / "report.md").exists() and all((run.folder / name).exists() for name in RECORDS)


def _contradiction(runs: Sequence[FinishedRun]) -> str:
    """What is to be done about runs of one fingerprint and different results."""
    one = next(run for run in runs if outcome(run) != outcome(runs[0]))
    return (
        f"{one.folder} and {runs[0].folder} have one fingerprint, {one.result.fingerprint[:8]}, and different "
        "results: remove the one that is not to count, in runs/ and in reports/"
    )


def unfinished(member: Member, places: Places) -> Path | None:
    """Folder of the member's newest run that has a checkpoint, no result, and no process that trains there."""
    folders = [folder for folder in _own_folders(member, places) if (folder / CHECKPOINT).exists()]
    return next((each for each in folders if not (each / "result.json").exists() and not _is_claimed(each)), None)


def _is_claimed(folder: Path) -> bool:
    try:
        with RunFolder.open(folder).claimed():
            return False
    except UserError:
        return True


def newest_step(member: Member, places: Places) -> int:
    """Optimiser steps logged by the member's newest run that has no result; 0 where there is none, or none readable."""
    for folder in _own_folders(member, places):
        if not (folder / "result.json").exists():
            try:
                return max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0)
            except UserError:
                return 0
    return 0


def _own_folders(member: Member, places: Places) -> list[Path]:
    """Folders of the member's runs, finished or not, the one that was started or resumed last first."""
    asked = asked_fingerprint(member.experiment)
    found = [
        path for path in (places.runs / member.version).glob("*/provenance.json") if _asked_in(path.parent) == asked
    ]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


@cache
def _asked_in(folder: Path) -> str | None:
    """asked_fingerprint of a run's config.yaml, which never changes; None where it cannot be read."""
    try:
        return asked_fingerprint(read_experiment(folder, load_dump))
    except UserError:
        return None

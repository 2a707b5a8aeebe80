"""A ladder from its request to its table."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from asnn_goose.cache import locked
from asnn_goose.config import Experiment
from asnn_goose.errors import UserError
from asnn_goose.reporting.rebuild import rebuild_reports
from asnn_goose.reporting.run_folder import write_errors, write_text
from asnn_goose.sweep.fan_out import fan_out, hire
from asnn_goose.sweep.members import SCALE, SEEDS, Member, plan
from asnn_goose.sweep.request import Request
from asnn_goose.sweep.stamp import Stamp, read_stamp, records_digest
from asnn_goose.sweep.state import Places, missing
from asnn_goose.sweep.work import Session, train_member

OWED = "reports-owed"
"""File in the ladder's folder: versions whose reports are to be made again when their members have run."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """What there is of a ladder before anything runs."""

    members: list[Member]
    missing: list[Member]
    """Those of them that have no finished run, in the order in which they are to run."""
    problems: dict[str, str]
    """Version or member -> why it cannot be run or used."""
    unreported: list[str]
    """Versions of which a finished run has no whole record beside a report."""


@dataclass(frozen=True)
class Outcome:
    """What became of a ladder."""

    members: int
    ran: int
    """Members that were run and finished."""
    problems: dict[str, str]
    """Version, member or report -> what went wrong."""
    written: list[Path]
    """Table, figures and page; empty where they were there."""


def standing(request: Request, argv: Sequence[str], places: Places) -> Standing:
    """Plan a ladder and look for what is finished of it."""
    planned = plan(request.versions, request.scale, request.seeds, request.overrides, argv)
    found = missing(planned.members, places)
    return Standing(planned.members, found.members, planned.refused | found.contradictory, found.unreported)


def run_ladder(request: Request, argv: Sequence[str], places: Places, session: Session = train_member) -> Outcome:
    """Run what is missing, make the reports of the versions again, since more seeds say more, and write the table.

    Raises:
        KeyboardInterrupt: the ladder was stopped; the same request goes on with it.
        UserError: the table cannot be written.
    """
    found = standing(request, argv, places)
    problems, owed = dict(found.problems), _owed(places)
    if found.missing:
        _owe(places, list(dict.fromkeys([*owed, *(member.version for member in found.members)])))
        crew = hire(found.missing, request.workers, request.cluster)
        _log.info(
            "%d of %d runs at scale %s are missing; %d at a time (%s), threads of each: %d",
            len(found.missing), len(found.members), request.scale, crew.workers, crew.cluster, crew.threads,
        )  # fmt: skip
        problems |= fan_out(found.missing, places, crew, session)
    ran = len([member for member in found.missing if member.name not in problems])
    versions = list(dict.fromkeys(member.version for member in found.members))
    stale = list(dict.fromkeys([*(versions if ran else ()), *owed, *found.unreported]))
    if stale:
        rebuilt = rebuild_reports(
            stale, places.runs, places.reports, lambda runs: tqdm(runs, desc="reports", leave=False, disable=None)
        )
        problems |= {f"report of {folder.name}": reason for folder, reason in rebuilt.failures.items()}
        problems |= {
            f"report of {folder.name}": f"{folder} has {lacking}, so no table counts it: put it back, or remove the "
            "folder"
            for folder, lacking in rebuilt.incomplete.items()
            if folder.is_relative_to(places.runs)
        }
    _owe(places, ())
    written = []
    # Where no version can be run at all, as at a scale that there is not, the table that is there stays.
    if versions and (stale or _is_stale(places.reports, request.scale, versions, request.overrides)):
        # Two ladders that write at once could leave the page of the one beside the table of the other.
        with locked(places.table_lock):
            written = write_table(places.reports, request.scale, versions, request.overrides)
    return Outcome(len(found.members), ran, problems, written)


def write_table(
    reports: Path, scale: str | None = None, versions: Sequence[str] = (), overrides: Sequence[str] = ()
) -> list[Path]:
    """Write roadmap.md, its figures and index.html of SEEDS and more versions; returns their paths.

    Args:
        scale: None: scale, versions and overrides of the table that is there; SCALE where there is none, or where these
            are no longer known.
        overrides: flags that every version was run with.

    Raises:
        UserError: no version can be run so.
    """
    from asnn_goose.reporting.ablation import write_roadmap

    told = read_stamp(reports / "roadmap.md") if scale is None else None
    if told is not None:
        scale, versions, overrides = told.scale, told.versions, told.overrides
    try:
        asked, stamp = _made_from(reports, scale or SCALE, versions, overrides)
    except UserError as error:
        if told is None:
            raise
        _log.warning("%s; the table is made at scale %s instead", error, SCALE)
        asked, stamp = _made_from(reports, SCALE, versions, ())
    return write_roadmap(reports, stamp.scale, [*SEEDS, *stamp.versions], asked, stamp.comment())


def _made_from(
    reports: Path, scale: str, versions: Sequence[str], overrides: Sequence[str]
) -> tuple[dict[str, Experiment], Stamp]:
    """Version -> its configuration; and the stamp that a table of SEEDS and more versions would have now."""
    more = tuple(version for version in dict.fromkeys(versions) if version not in SEEDS)
    planned = plan([*SEEDS, *more], scale, seeds=1, overrides=overrides)
    if not planned.members:
        raise UserError(f"no table at scale {scale!r}: {next(iter(planned.refused.values()))}")
    asked = {member.version: member.experiment for member in planned.members}
    return asked, Stamp(scale, more, tuple(overrides), records_digest(reports, asked, [*SEEDS, *more]))


def _is_stale(reports: Path, scale: str, versions: Sequence[str], overrides: Sequence[str]) -> bool:
    """Whether there are records, and the table was made from others or for another request, or lacks page or figure."""
    if not any(reports.glob("*/*/result.json")):
        return False
    table = reports / "roadmap.md"
    if read_stamp(table) != _made_from(reports, scale, versions, overrides)[1]:
        return True
    embedded = re.findall(r"^!\[\w+\]\((.+)\)$", table.read_text(encoding="utf-8"), re.MULTILINE)
    return not all((reports / name).exists() for name in ("index.html", *embedded))


def _owed(places: Places) -> list[str]:
    """Versions whose reports a ladder that was killed had still to make again."""
    path = places.ladder / OWED
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def _owe(places: Places, versions: Sequence[str]) -> None:
    path = places.ladder / OWED
    with write_errors(path.parent):
        if versions:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "\n".join(versions))
        else:
            path.unlink(missing_ok=True)

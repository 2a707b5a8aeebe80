"""A ladder from its request to its table."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from asnn_goose.reporting.rebuild import rebuild_reports
from asnn_goose.sweep.fan_out import fan_out, hire
from asnn_goose.sweep.members import SCALE, SEEDS, Member, plan
from asnn_goose.sweep.request import Request
from asnn_goose.sweep.state import Places, missing
from asnn_goose.sweep.work import Session, train_member

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
    problems = dict(found.problems)
    if found.missing:
        crew = hire(found.missing, request.workers, request.cluster)
        _log.info(
            "%d of %d runs at scale %s are missing; %d at a time (%s), threads of each: %d",
            len(found.missing), len(found.members), request.scale, crew.workers, crew.cluster, crew.threads,
        )  # fmt: skip
        problems |= fan_out(found.missing, places, crew, session)
    ran = len([member for member in found.missing if member.name not in problems])
    stale = list(dict.fromkeys(member.version for member in found.members)) if ran else found.unreported
    if stale:
        rebuilt = rebuild_reports(
            stale, places.runs, places.reports, lambda runs: tqdm(runs, desc="reports", leave=False, disable=None)
        )
        problems |= {f"report of {folder.name}": reason for folder, reason in rebuilt.failures.items()}
    written = []
    versions = [member.version for member in found.members]
    if stale or _is_stale(places.reports, request.scale, versions):
        written = write_table(places.reports, request.scale, versions, request.overrides)
    return Outcome(len(found.members), ran, problems, written)


def write_table(
    reports: Path, scale: str | None = None, versions: Sequence[str] = (), overrides: Sequence[str] = ()
) -> list[Path]:
    """Write roadmap.md, its figures and index.html of SEEDS and more versions; returns their paths.

    Args:
        scale: None: that of the table that is there, SCALE where there is none.
        overrides: flags that every version was run with.
    """
    from asnn_goose.reporting.ablation import write_roadmap

    scale = scale or _scale_of(reports / "roadmap.md") or SCALE
    every = list(dict.fromkeys([*SEEDS, *versions]))
    asked = {member.version: member.experiment for member in plan(every, scale, seeds=1, overrides=overrides).members}
    return write_roadmap(reports, scale, every, asked)


def _is_stale(reports: Path, scale: str, versions: Sequence[str]) -> bool:
    """Whether there are records, and the table is older than one of them, of another scale or without a version."""
    table = reports / "roadmap.md"
    records = {path: path.stat().st_mtime for path in reports.glob("*/*/result.json")}
    if not records or not table.exists():
        return bool(records)
    text = table.read_text(encoding="utf-8")
    recorded = {path.parents[1].name for path in records}
    return (
        table.stat().st_mtime < max(records.values())
        or _scale_of(table) != scale
        or any(
            f"| {version} |" not in text and f"]({version}/" not in text for version in recorded.intersection(versions)
        )
    )


def _scale_of(table: Path) -> str | None:
    """The last word of the table's title."""
    return table.read_text(encoding="utf-8").partition("\n")[0].rpartition(" ")[2] if table.exists() else None

"""Every report again, from the records beside it or, where these are not whole, from the run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asnn_goose.errors import UserError
from asnn_goose.reporting.classifier_report import write_classifier_index, write_classifier_report_alone
from asnn_goose.reporting.classifier_runs import is_classifier_run, recorded_classifiers
from asnn_goose.reporting.classifier_table import write_classifier_table
from asnn_goose.reporting.comparison import finished_runs, run_folders
from asnn_goose.reporting.report import write_index, write_report_alone
from asnn_goose.reporting.run_folder import RECORDS


@dataclass
class Rebuilt:
    """What became of the reports."""

    reports: list[Path] = field(default_factory=list)
    """Paths of those that were written."""
    incomplete: dict[Path, str] = field(default_factory=dict)
    """Folder whose report stays as it is -> which RECORDS it lacks, in words."""
    failures: dict[Path, str] = field(default_factory=dict)
    """Folder -> why its report could not be written, in a sentence."""


def find_run(name: str, runs_root: Path, reports_root: Path) -> Path:
    """Folder of a finished run, given as a path or as ``<version>/<run_id>``; for the latter its records come first.

    Raises:
        UserError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    version, _, run_id = name.strip("/").rpartition("/")
    found = run_folders(version, runs_root, reports_root).get(run_id) if version else None
    if not found:
        raise UserError(
            f"{name!r} is no folder, and no finished run below {runs_root} or {reports_root}: name a run's folder, or "
            "its version and id as in v10/20261125-055936-s1-843762e7"
        )
    return found[0]


def versions_with_runs(runs_root: Path, reports_root: Path) -> list[str]:
    """Versions that have a finished run, by name."""
    results = [path for root in (runs_root, reports_root) for path in root.glob("*/*/result.json")]
    return sorted({path.parents[1].name for path in results})


def _write_report(folder: Path, reports_root: Path, runs_root: Path) -> Path:
    """The report of a finished run, language model or classifier, without its version's list; returns its path.

    Raises:
        UserError: the run is not finished, or one of its files is damaged.
    """
    if is_classifier_run(folder):
        return write_classifier_report_alone(folder, reports_root)
    return write_report_alone(folder, reports_root, runs_root)


def write_named_reports(names: Iterable[str], reports_root: Path, runs_root: Path) -> Iterator[Path]:
    """Write the reports of runs that :func:`find_run` finds, the lists of their versions and the classifiers' table;
    yields each report's path.

    Raises:
        UserError: some could not be written, told when all others are.
    """
    failures, versions = [], set()
    for name in names:
        try:
            report = _write_report(find_run(name, runs_root, reports_root), reports_root, runs_root)
            versions.add(report.parents[1].name)
            yield report
        except UserError as error:
            failures.append(str(error))
    for version in versions:
        _write_list(version, reports_root)
    write_classifier_table(reports_root)
    if failures:
        raise UserError("\nerror: ".join(failures))


def rebuild_reports(
    versions: Sequence[str],
    runs_root: Path,
    reports_root: Path,
    watch: Callable[[Sequence[list[Path]]], Iterable[list[Path]]] = iter,
) -> Rebuilt:
    """Write the reports of all finished runs of some versions; one that fails keeps no other.

    Args:
        watch: wraps the loop over the runs, to show progress.
    """
    found = [folders for version in versions for folders in run_folders(version, runs_root, reports_root).values()]
    rebuilt = Rebuilt()
    for folders in watch(found):
        first = folders[0]
        if lacking := [f"no {name}" for name in RECORDS if not (first / name).exists()]:
            rebuilt.incomplete[first] = " and ".join(lacking)
            continue
        for folder in folders:
            try:
                rebuilt.reports.append(_write_report(folder, reports_root, runs_root))
                rebuilt.failures.pop(first, None)
                break
            except (UserError, OSError) as error:
                rebuilt.failures.setdefault(first, str(error))
    for version in {folders[0].parent.name for folders in found}:
        _write_list(version, reports_root)
    return rebuilt


def _write_list(version: str, reports_root: Path) -> None:
    """README.md of a version, which changes with its ancestors even where no report of its own is made again."""
    if recorded_classifiers(reports_root, version):
        write_classifier_index(version, reports_root)
    elif finished_runs(version, reports_root, reports_root):
        write_index(version, reports_root)

"""The command line: one experiment from flags to report, the ladder of all of them, and reports made again.

Runs go to ``runs/`` and reports to ``reports/`` of this checkout, or where ``ASNN_GOOSE_RUNS`` and
``ASNN_GOOSE_REPORTS`` say.
"""

import contextlib
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asnn_goose.config import (
    AnyExperiment,
    ClassifierExperiment,
    Invocation,
    delta,
    dump,
    is_classifier,
    is_classifier_dump,
    load_classifier_dump,
    load_classifier_experiment,
    load_dump,
    load_experiment,
)
from asnn_goose.console import Unheard, log_to_stderr
from asnn_goose.errors import UserError
from asnn_goose.process import prepare_libraries

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""

_log = logging.getLogger(__name__)


def main(experiment_name: str, argv: Sequence[str] | None = None) -> int:
    """Run an experiment; returns the exit status.

    Args:
        experiment_name: a version, which is a file of configs, without its ending.
        argv: flags; None: those of the process.

    Mistakes of the user end in one sentence on stderr and status 2; ``--debug`` shows the traceback as well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_libraries()

    def work() -> int:
        load = load_classifier_experiment if is_classifier(experiment_name) else load_experiment
        invocation = load(experiment_name, argv)
        log_to_stderr(invocation.debug)
        if invocation.dry_run:
            print(_plan(invocation))
            return 0
        return _run(invocation, argv)

    stopped = "stopped; there is no checkpoint yet, so start again without --resume"
    if any(word.partition("=")[0] == "--resume" for word in argv):
        stopped = "stopped; the run is as it was, so go on with the same command"
    return _in_a_sentence(work, argv, stopped)


def ladder(argv: Sequence[str] | None = None) -> int:
    """Run what the ladder of versions lacks and write its table (asnn_goose/sweep); returns the exit status.

    What fails or cannot be run is told in a sentence each, keeps nothing else, and makes the status 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_libraries()
    return _in_a_sentence(lambda: _ladder(argv), argv, "stopped; the same command goes on from here")


def report(argv: Sequence[str]) -> int:
    """Make reports again from the records beside them, or from runs/; returns the exit status.

    Args:
        argv: folders of runs, or names ``<version>/<run_id>``; or ``--all``, which writes the ladder's table as well.
            The classifiers' table is written in both cases.
    """
    return _in_a_sentence(lambda: _report(argv), argv, "stopped")


def _in_a_sentence(work: Callable[[], int], argv: Sequence[str], stopped: str) -> int:
    """Do it; mistakes and Ctrl-C end in one sentence."""
    with contextlib.redirect_stderr(Unheard(sys.stderr)):
        return _told(work, argv, stopped)


def _told(work: Callable[[], int], argv: Sequence[str], stopped: str) -> int:
    try:
        status = work()
        # At the end of the process it would be too late to answer for a reader that has gone.
        sys.stdout.flush()
        return status
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:
        # Of --help, which ends the process by itself.
        return int(end.code or 0)
    except BrokenPipeError:
        # Who read the output has seen enough; nothing more must reach for it at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _folder(kind: str) -> Path:
    """Where runs or reports go."""
    return Path(os.environ.get(f"ASNN_GOOSE_{kind.upper()}") or ROOT / kind).expanduser()


def _plan(invocation: Invocation[Any]) -> str:
    """What a run would do, without doing it."""
    experiment = invocation.experiment
    if isinstance(experiment, ClassifierExperiment):
        return _classifier_plan(experiment)
    train = experiment.train
    window = experiment.data.window
    lines = [
        f"{experiment.version}: {experiment.question}",
        f"change: {experiment.change}",
        f"scale {train.scale}: {train.total_steps(window)} optimiser steps of {train.step_tokens(window)} tokens",
    ]
    if experiment.parent is not None:
        parent = load_experiment(experiment.parent, ["--scale", invocation.scale]).experiment
        lines += [f"  {key}: {old} -> {new}" for key, (old, new) in delta(experiment, parent).items()]
    from asnn_goose.train.plan import drawn

    lines += ["schedules over the run (first .. largest .. last):", *(f"  {line}" for line in drawn(experiment))]
    return "\n".join(lines) + "\n\n" + dump(experiment)


def _classifier_plan(experiment: ClassifierExperiment) -> str:
    train, task = experiment.train, experiment.task
    name = task.name if task.path is None else task.path.stem
    lines = [
        f"{experiment.version}: {experiment.question}",
        f"change: {experiment.change}",
        f"scale {train.scale}: passes over task {name}: {train.length * train.epochs:g}, "
        f"{train.batch_size} texts a step",
    ]
    if experiment.general is not None:
        stage = experiment.general.of_length(train.general_length)
        lines.append(f"first stage: {stage.tokens:,} tokens of text without labels")
    if experiment.parent is not None:
        parent = load_classifier_experiment(experiment.parent, ["--scale", train.scale]).experiment
        lines += [f"  {key}: {old} -> {new}" for key, (old, new) in delta(experiment, parent).items()]
    return "\n".join(lines) + "\n\n" + dump(experiment)


def _newest(version: str) -> Path:
    """The run of a version, finished or not, that was started or resumed last."""
    folder = _folder("runs") / version
    runs = sorted(folder.glob("*/provenance.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run of {version} under {folder} to resume: start one without --resume")
    return runs[-1].parent


def _resumed(invocation: Invocation[Any]) -> Path | None:
    """Folder of the run to go on with: the one named, else the one in --run-dir, else the newest."""
    if invocation.resume is None:
        return None
    if invocation.resume == "newest":
        return invocation.run_dir or _newest(invocation.experiment.version)
    if invocation.run_dir not in (None, invocation.resume):
        raise UserError(
            f"--run-dir {invocation.run_dir} and --resume {invocation.resume} name two folders: a run goes on where it "
            "is, so drop --run-dir"
        )
    return invocation.resume


def _resumed_experiment(invocation: Invocation[Any], argv: Sequence[str], path: Path) -> AnyExperiment:
    """The run's own configuration; flags may repeat it but not change it."""
    from asnn_goose.reporting.run_folder import RunFolder, read_config

    folder = RunFolder.open(path)
    text = read_config(path)
    own = (load_classifier_dump if is_classifier_dump(text) else load_dump)(text, str(folder.config))
    asked = invocation.experiment
    if own.version != asked.version:
        raise UserError(f"{path} is a run of {own.version}, not of {asked.version}: use experiments/{own.version}.py")
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    for key, (old, new) in delta(asked, own).items():
        # The flag may have named the key, a branch around it, or, to pick a file, its group.
        names = ["scale"] if key == "train.scale" else [key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)]
        if (flag := next((name for name in names if name in given), None)) is not None:
            raise UserError(
                f"{path} was started with {key} = {old} and cannot go on with {new}: drop --{flag}, or start a new run"
            )
    return own


def _run(invocation: Invocation[Any], argv: Sequence[str]) -> int:
    experiment, resume = invocation.experiment, _resumed(invocation)
    if resume is not None:
        experiment = _resumed_experiment(invocation, argv, resume)
    # Heavy imports wait until the flags are known to be right.
    _log.info("%s: loading libraries", experiment.version)
    from asnn_goose.reporting import report_head
    from asnn_goose.train.classifier_session import run_classifier_session
    from asnn_goose.train.loop import Interrupted
    from asnn_goose.train.session import run_session

    begun, started = time.monotonic(), datetime.now(UTC)
    script = f"experiments/{experiment.version}.py"
    try:
        places: dict[str, Any] = {
            "argv": ["python", script, *argv],
            "overrides": invocation.overrides,
            "runs_root": _folder("runs"),
            "reports_root": _folder("reports"),
            "run_dir": invocation.run_dir,
            "resume": resume,
            "started": started,
        }
        if isinstance(experiment, ClassifierExperiment):
            report = run_classifier_session(experiment, **places)
        else:
            report = run_session(experiment, **places)
    except Interrupted as stop:
        if not str(stop):  # of several processes, the one without the folder
            return 0
        command = shlex.join(["python", script, "--resume", str(stop)])
        print(f"\nstopped; the run is saved. Go on with: {command}", file=sys.stderr)
        return INTERRUPTED
    if report is not None:
        print(f"\n{report_head(report)}\n\nreport: {report}  ({time.monotonic() - begun:.0f} s)")
    return 0


def _ladder(argv: Sequence[str]) -> int:
    from asnn_goose.reporting.markdown import counted
    from asnn_goose.sweep import Places, parse_request, run_ladder, standing, usage

    if {"--help", "-h"} & set(argv):
        print(usage())
        return 0
    request = parse_request(argv)
    log_to_stderr("--debug" in argv)
    command = ["python", "experiments/roadmap.py", *argv]
    places = Places(_folder("runs").resolve(), _folder("reports").resolve())
    if request.dry_run:
        found = standing(request, command, places)
        for member in found.missing:
            print(f"{member.name}: {member.steps} optimiser steps")
        print(f"{len(found.missing)} of {len(found.members)} runs at scale {request.scale} are missing")
        return _complain(found.problems)
    done = run_ladder(request, command, places)
    for path in done.written:
        print(f"written: {path}")
    runs = f"{done.members} runs at scale {request.scale}"
    if not done.ran and not done.problems:
        print(f"nothing to run: all {runs} are finished")
    else:
        print(f"{done.ran} of {runs} were run, {counted(len(done.problems), 'problem')}")
    return _complain(done.problems)


def _complain(problems: Mapping[str, str]) -> int:
    """Say what went wrong, equal reasons once; returns the exit status."""
    for reason in dict.fromkeys(problems.values()):
        names = ", ".join(name for name, other in problems.items() if other == reason)
        print(f"{names}: {reason}", file=sys.stderr)
    return 1 if problems else 0


def _report(argv: Sequence[str]) -> int:
    from asnn_goose.cache import locked
    from asnn_goose.reporting.classifier_table import write_classifier_table
    from asnn_goose.reporting.rebuild import rebuild_reports, versions_with_runs, write_named_reports
    from asnn_goose.sweep import Places, write_table

    log_to_stderr("--debug" in argv)
    runs_root, reports_root = _folder("runs"), _folder("reports")
    names = [word for word in argv if word not in ("--all", "--debug")]
    unknown = next((name for name in names if name.startswith("--")), None)
    if unknown is not None or ("--all" in argv) == bool(names):
        raise UserError(f"report {shlex.join(argv)}: name runs, or give --all")
    if names:
        for path in write_named_reports(names, reports_root, runs_root):
            print(path)
        return 0
    versions = versions_with_runs(runs_root, reports_root)
    done = rebuild_reports(versions, runs_root, reports_root, lambda runs: tqdm(runs, unit="report", disable=None))
    print(f"reports written: {len(done.reports)}")
    for folder, lacking in done.incomplete.items():
        print(f"{folder} has {lacking}, so its report stays as it is")
    status = _complain({str(folder): reason for folder, reason in done.failures.items()})
    if any(not is_classifier(version) for version in versions):
        # A ladder that ends now writes the same files.
        with locked(Places(runs_root.resolve(), reports_root.resolve()).table_lock):
            write_table(reports_root)
    if versions:
        write_classifier_table(reports_root)
    return status


def command(argv: Sequence[str]) -> int:
    """``python -m asnn_goose.cli report ...``; returns the exit status."""
    asked = bool({"--help", "-h"} & set(argv))
    if argv[:1] == ["report"] and not asked:
        return report(argv[1:])
    print("usage: python -m asnn_goose.cli report (--all | RUN ...)", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

"""The ladder from its command to its table: run, killed, stopped, gone on with, and finished; with real, tiny runs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from asnn_goose import cli
from asnn_goose.reporting import load_result, read_metrics
from tests.conftest import until

REPOSITORY = Path(__file__).parents[1]
RUN_TIMES = {"run_id", "started", "wall_seconds", "seconds_by_phase", "tokens_per_second", "peak_memory_bytes"}


@pytest.fixture
def ladder(tiny_flags, tmp_path) -> Callable[..., list[str]]:
    """Command of a ladder of tiny runs: what comes first says how many, keywords change the runs."""

    def command(*words: str, **changes: object) -> list[str]:
        return [sys.executable, str(REPOSITORY / "experiments" / "roadmap.py"), *words, *tiny_flags(**changes)]

    return command


def finish(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # Of tests that run in the background a shell has SIGINT ignored, which a ladder would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def results(root: Path) -> dict[str, dict]:
    """Folder of version and seed -> what every run of it must have measured."""
    found = {}
    for path in sorted(root.glob("*/*/result.json")):
        tree = json.loads(load_result(path).model_dump_json())
        name = f"{tree['version']} seed {tree['seed']}"
        assert name not in found, "a member was run twice"
        found[name] = {key: value for key, value in tree.items() if key not in RUN_TIMES}
    return found


def logs(root: Path) -> str:
    return "".join(path.read_text() for path in sorted(root.glob(".ladder/*/*_log.err")))


@pytest.mark.slow
def test_two_members_at_once_then_nothing_to_do(ladder, tmp_path, monkeypatch):
    """From an empty cache, so that both workers want the same targets of the teacher at the same time."""
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "cache"))
    command = ladder("--versions=v10,v11_1", "--seeds=1", "--workers=2")
    done = finish(command)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs at scale smoke are missing; 2 at a time (local), threads of each: " in done.stderr
    assert done.stdout.endswith("2 of 2 runs at scale smoke were run, 0 problems\n")
    assert list(results(tmp_path / "runs")) == ["v10 seed 0", "v11_1 seed 0"]
    text = logs(tmp_path / "runs")
    assert text.count("tokenising corpus texts") == 1
    assert text.count("capturing the teacher's targets (once)") == 1
    assert text.count("computing the teacher's states on validation text (once)") == 1
    for version in ("v10", "v11_1"):
        (report,) = (tmp_path / "reports" / version).glob("*/report.md")
        assert "experiments/roadmap.py" in (report.parent / "provenance.json").read_text()
        assert f"python experiments/{version}.py --scale=smoke --seed=0 " in report.read_text()
    table = tmp_path / "reports" / "roadmap.md"
    assert f"written: {table}" in done.stdout
    assert "[v11_1](v11_1/README.md)" in table.read_text()

    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    again = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and again.stdout == "nothing to run: all 2 runs at scale smoke are finished\n"
    imported = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines()}
    assert "asnn_goose.sweep.ladder" in imported and not {"torch", "matplotlib", "transformers"} & imported
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()
    }


def steps_of(root: Path) -> int:
    """Steps logged by the only run below `root`, 0 while there is none."""
    return max((line["step"] for path in root.glob("*/*/metrics.jsonl") for line in read_metrics(path)), default=0)


def is_told_to_stop(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a process that is held."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (pending,) = (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_ladder_goes_on_where_it_was(ladder, tmp_path, how):
    """Killed: the ladder and its worker, at once, by SIGKILL. Stopped: SIGINT to the ladder alone."""
    command = ladder("--versions=v10", "--seeds=1", train__steps=100, train__checkpoint_every=10, train__accumulate=2)
    running, runs = start(command), tmp_path / "runs"
    until(lambda: steps_of(runs) >= 15)
    if how == "killed":
        for process in [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]:
            process.kill()
        running.communicate()
    else:
        workers = psutil.Process(running.pid).children(recursive=True)
        # Held, so that it cannot be through before the ladder has told it to stop.
        for process in workers:
            process.suspend()
        try:
            running.send_signal(signal.SIGINT)
            until(lambda: any(map(is_told_to_stop, workers)))
        finally:
            for process in workers:
                process.resume()
        _, told = running.communicate(timeout=600)
        assert running.returncode == cli.INTERRUPTED, told
        assert told.endswith("stopped; the same command goes on from here\n") and "Traceback" not in told
    (folder,) = runs.glob("v10/*")
    assert not (folder / "result.json").exists() and 15 <= steps_of(runs) < 100
    done = finish(command)
    assert done.returncode == 0, done.stderr
    (session,) = json.loads((folder / "provenance.json").read_text())["resumed"]
    # What is killed goes on from its last checkpoint, what is stopped from the step that it was in.
    assert session["step"] % 10 == 0 if how == "killed" else session["step"] >= 15
    assert list(results(runs)) == ["v10 seed 0"]

    straight = tmp_path / "straight"
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env=os.environ | {"ASNN_GOOSE_RUNS": str(straight), "ASNN_GOOSE_REPORTS": str(tmp_path / "others")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(straight) == results(runs)


@pytest.mark.slow
def test_a_worker_that_outlives_its_ladder_is_waited_for(ladder, tmp_path):
    command = ladder("--versions=v10", "--seeds=1", train__steps=100, train__accumulate=2)
    first, runs = start(command), tmp_path / "runs"
    until(lambda: steps_of(runs) >= 5)
    survivors = psutil.Process(first.pid).children(recursive=True)
    # Held, so that it cannot be through before the next ladder asks.
    for process in survivors:
        process.suspend()
    first.kill()
    first.wait()
    second = start(command)
    try:
        until(lambda: "waiting for another process that prepares" in logs(runs))
    finally:
        for process in survivors:
            process.resume()
    _, told = second.communicate(timeout=600)
    assert second.returncode == 0, told
    assert list(results(runs)) == ["v10 seed 0"] and len(list(runs.glob("v10/*"))) == 1


def test_what_cannot_be_run_is_told_and_the_status_is_one(capfd, ladder, tmp_path):
    assert cli.ladder(ladder("--versions=v11_9,v11_8", "--dry-run")[2:]) == 1
    printed = capfd.readouterr()
    assert printed.out == "0 of 0 runs at scale smoke are missing\n"
    first, second = printed.err.splitlines()
    assert first.startswith("v11_9: no experiment named 'v11_9'") and second.startswith("v11_8: no experiment")
    assert cli.ladder(ladder("--versions=v10,v11_1", "--train.lrr=1")[2:]) == 1
    printed = capfd.readouterr()
    assert printed.err.startswith("v10, v11_1: train.lrr = '1' (command line): no such key")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_what_is_missing(capfd, ladder, tmp_path):
    assert cli.ladder(ladder("--versions=v10,v11_1", "--seeds=2", "--dry-run")[2:]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "v10 seed 0: 4 optimiser steps",
        "v11_1 seed 0: 4 optimiser steps",
        "v10 seed 1: 4 optimiser steps",
        "v11_1 seed 1: 4 optimiser steps",
        "4 of 4 runs at scale smoke are missing",
    ]
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_flags(capfd):
    assert cli.ladder(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(f"--{flag}" in out for flag in ("versions", "seeds", "scale", "workers", "cluster", "dry-run"))

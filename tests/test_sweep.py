"""The ladder: what is finished is kept, what is missing is run once, and what happens to one member stops no other.

Where a training would take minutes a stub takes its place: it writes a run made from one that was really trained.
"""

import json
import logging
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import psutil
import pytest
import yaml

from asnn_goose.cache import locked
from asnn_goose.config import dump, load_experiment
from asnn_goose.config.load import CONFIGS
from asnn_goose.errors import UserError
from asnn_goose.reporting import write_report
from asnn_goose.reporting.rebuild import rebuild_reports
from asnn_goose.reporting.run_folder import RunFolder
from asnn_goose.sweep import Places, parse_request, run_ladder, write_table
from asnn_goose.sweep.fan_out import WORKER_BYTES, Crew, _last_of_trace, fan_out, hire
from asnn_goose.sweep.ladder import OWED
from asnn_goose.sweep.members import Member, plan
from asnn_goose.sweep.stamp import Stamp, read_stamp
from asnn_goose.sweep.state import CHECKPOINT, asked_fingerprint, missing, newest_step, unfinished
from asnn_goose.sweep.work import run_member
from asnn_goose.train import checkpoint
from tests.conftest import until

# Workers cannot import a test's module, so its functions go to them whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def places(tmp_path) -> Places:
    return Places(tmp_path / "runs", tmp_path / "reports")


@pytest.fixture
def members() -> list[Member]:
    """v10 and v11_1 with seeds 0 and 1, at the smoke scale."""
    return plan(["v10", "v11_1"], "smoke", seeds=2).members


def write_run(template: Path, folder: Path, member: Member, **results: object) -> Path:
    """A finished run of `member`: the template's files with its configuration, and results that are its own."""
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("checkpoints", "student"), dirs_exist_ok=True)
    (folder / "config.yaml").write_text(dump(member.experiment))
    tree = json.loads((template / "result.json").read_text())
    tree |= {"run_id": folder.name, "version": member.version, "parent": member.experiment.parent}
    tree |= {"seed": member.seed, "scale": "smoke", "fingerprint": asked_fingerprint(member.experiment)}
    (folder / "result.json").write_text(json.dumps(tree | results))
    return folder


PERPLEXITIES = {"v10": (200.0, 220.0), "v11_1": (100.0, 121.0)}
"""Of the stub's runs, by seed."""


def stub(template: Path, member: Member, places: Places, resume: Path | None) -> None:
    """A session that trains nothing, and notes that it was called."""
    with (places.runs / "calls.txt").open("a") as calls:
        calls.write(f"{member.name}{' resumed' if resume else ''}\n")
    folder = resume or places.runs / member.version / f"run-s{member.seed}"
    student = json.loads((template / "result.json").read_text())["student"]
    perplexity = PERPLEXITIES[member.version][member.seed]
    write_run(template, folder, member, student=student | {"test_ppl": perplexity})
    write_report(folder, places.reports, places.runs)


def calls(places: Places) -> list[str]:
    path = places.runs / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def names(found: list[Member]) -> list[str]:
    return [member.name for member in found]


# Which members, and in which order


@pytest.fixture
def configs(tmp_path) -> Callable[..., None]:
    """Writes an experiment into a copy of ``configs/``, whose folder is its ``root``."""
    root = tmp_path / "configs"
    shutil.copytree(CONFIGS, root)

    def write(version: str, **keys: object) -> None:
        text = yaml.safe_dump({"question": "Does it help?", "change": "It.", **keys})
        (root / "experiment" / f"{version}.yaml").write_text(text)

    write.root = root  # pyright: ignore[reportFunctionMemberAccess]
    return write


def test_seed_by_seed_and_parents_before_children(configs):
    configs("grandchild", parent="v11_1")
    configs("alone", parent="v11_2")
    versions = ["grandchild", "v11_1", "v10", "alone"]
    found = plan(versions, "smoke", seeds=2, overrides=["--train.lr=1e-3"], root=configs.root)
    assert found.refused == {}
    # v11_1 changes v10; the parent of alone is not asked for.
    order = ("v10", "alone", "v11_1", "grandchild")
    assert names(found.members) == [f"{version} seed {seed}" for seed in (0, 1) for version in order]
    assert {member.experiment.train.lr for member in found.members} == {1e-3}
    assert found.members[-1].overrides == {"seed": 1, "train.lr": 1e-3}


@pytest.mark.parametrize(
    ("version", "cap", "seeds"),
    [
        ("v10", None, [0, 1, 2, 3, 4]),
        ("v10_rkl", None, [0, 1, 2]),
        ("v10_rkl", 5, [0, 1, 2, 3, 4]),
        ("v10", 2, [0, 1]),
        ("aa", 2, [5, 6]),
        ("v11_1_token", None, [0, 1, 2]),
    ],
)
def test_each_version_has_its_own_seeds(version, cap, seeds, configs):
    configs("aa", parent="v10")
    assert [member.seed for member in plan([version], "smoke", cap, root=configs.root).members] == seeds


def test_versions_that_cannot_be_resolved_are_refused_in_a_sentence_each(configs):
    configs("orphan", parent="v9")
    configs("hen", parent="egg")
    configs("egg", parent="hen")
    found = plan(["v11_9", "orphan", "hen", "v10"], "smoke", seeds=1, root=configs.root)
    assert names(found.members) == ["v10 seed 0"]
    assert list(found.refused) == ["v11_9", "orphan", "hen"]
    unknown, orphan, circle = found.refused.values()
    assert unknown.startswith("no experiment named 'v11_9'; there is ")
    assert orphan.startswith("no experiment named 'v9' (configs/experiment/orphan.yaml: parent)")
    assert circle == "configs/experiment/egg.yaml: parent hen closes a circle: hen -> egg -> hen"


def test_a_ladder_is_of_language_models():
    (sentence,) = plan(["v17_two_stage"], "smoke").refused.values()
    assert sentence.endswith("of language models: run experiments/v17_two_stage.py")


def test_a_run_of_a_ladder_takes_one_device(configs):
    """The second process of one would wait for the lock that the first holds."""
    found = plan(["v10"], "smoke", seeds=1, overrides=["--train.devices=2"], root=configs.root)
    assert not found.members
    assert found.refused["v10"].startswith("train.devices is 2, and each run of a ladder takes one device")


def test_flags_are_the_ladders_or_every_runs():
    request = parse_request(["--versions", "v10,v11_1", "--train.lr", "5e-4", "--workers=2", "--student=goose"])
    assert (request.versions, request.scale, request.seeds, request.workers) == (("v10", "v11_1"), "ladder", None, 2)
    assert request.overrides == ("--train.lr", "5e-4", "--student=goose")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds=0"], "argument --seeds: invalid number above 0 value: '0'"),
        (["--workers=two"], "argument --workers: invalid number above 0 value: 'two'"),
        (["--cluster=cloud"], "argument --cluster: invalid choice: 'cloud'"),
        (["--versions=,"], "--versions ',' names none"),
        (["--seed", "3"], "--seed is for a single run, not for a ladder: --seeds N gives each version N"),
        (["--resume"], "--resume is for a single run, not for a ladder"),
        (["--run-dir=x"], "--run-dir is for a single run, not for a ladder"),
    ],
)
def test_a_mistake_in_the_flags_is_one_sentence(argv, words):
    with pytest.raises(UserError) as caught:
        parse_request(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# What there is


def test_what_changes_a_number_is_asked_for_and_nothing_else_is():
    def asked(*flags: str, version: str = "v10") -> str:
        return asked_fingerprint(load_experiment(version, ["--scale=smoke", *flags]).experiment)

    changed = {asked("--seed=1"), asked("--train.lr=1e-3"), asked("--teacher.name=x"), asked(version="v12")}
    assert len(changed | {asked()}) == 5
    assert asked() == asked("--train.log_every=3", "--train.wandb=offline", "--train.device=cpu")


@pytest.mark.parametrize("place", ["runs", "reports"])
def test_a_run_or_its_record_is_finished(tiny_run, places, members, place):
    for member in members[:2]:
        write_run(tiny_run, getattr(places, place) / member.version / f"run-s{member.seed}", member)
    found = missing(members, places)
    assert names(found.members) == ["v10 seed 1", "v11_1 seed 1"] and found.contradictory == {}
    # What has a run but no record, or a record but no report, is to get one.
    assert found.unreported == ["v10", "v11_1"]
    (getattr(places, place) / "v10" / "run-s0" / "report.md").touch()
    assert missing(members, places).unreported == (["v10", "v11_1"] if place == "runs" else ["v11_1"])
    if place == "reports":
        # Of a record of earlier days, with less in it, there is no report to make.
        (places.reports / "v11_1" / "run-s0" / "metrics.jsonl").unlink()
        assert missing(members, places).unreported == []
    others = plan(["v10"], "smoke", seeds=1, overrides=["--train.lr=1e-3"]).members
    assert missing(others, places).members == others


def test_a_torn_result_is_missing_and_told(tiny_run, places, members, caplog):
    folder = write_run(tiny_run, places.runs / "v10" / "torn", members[0])
    (folder / "result.json").write_bytes((folder / "result.json").read_bytes()[:500])
    assert missing(members[:1], places).members == members[:1]
    assert f"{folder / 'result.json'} is not the result of a run" in caplog.text


def test_a_torn_record_does_not_hide_the_run(tiny_run, places, members, caplog):
    for root in places:
        write_run(tiny_run, root / "v10" / "torn", members[0])
    (places.reports / "v10" / "torn" / "result.json").write_text("{")
    assert missing(members[:1], places).members == []


def test_one_fingerprint_with_two_results_is_told(tiny_run, places, members):
    one = write_run(tiny_run, places.runs / "v10" / "one", members[0])
    two = write_run(tiny_run, places.reports / "v10" / "two", members[0])
    assert missing(members[:1], places).contradictory == {}
    write_run(tiny_run, two, members[0], kl_to_teacher=7.0)
    found = missing(members[:1], places)
    assert found.members == [] and list(found.contradictory) == ["v10 seed 0"]
    sentence = found.contradictory["v10 seed 0"]
    assert str(one) in sentence and str(two) in sentence and "different results" in sentence
    # Another machine's number format makes another fingerprint, and other numbers are no contradiction then.
    write_run(tiny_run, two, members[0], kl_to_teacher=7.0, fingerprint="0" * 64)
    assert missing(members[:1], places).contradictory == {}


def test_one_fingerprint_in_two_versions_with_two_results_is_told(tiny_run, places, members):
    """The other run need not be one that is asked for: v11_1 has another learning rate."""
    v10, v11_1 = members[0], members[1]
    one = write_run(tiny_run, places.runs / "v10" / "one", v10, fingerprint="0" * 64)
    faster = v11_1.experiment.train.model_copy(update={"lr": 1.0})
    other = replace(v11_1, experiment=v11_1.experiment.model_copy(update={"train": faster}))
    two = write_run(tiny_run, places.runs / "v11_1" / "two", other, fingerprint="0" * 64)
    assert missing(members, places).contradictory == {}
    write_run(tiny_run, two, other, fingerprint="0" * 64, kl_to_teacher=7.0)
    found = missing(members, places).contradictory
    assert list(found) == ["v10 seed 0"] and str(one) in found["v10 seed 0"] and str(two) in found["v10 seed 0"]


def test_records_below_the_runs_are_records(tiny_run, tmp_path, members):
    nested = Places(tmp_path / "runs", tmp_path / "runs" / "reports")
    folder = write_run(tiny_run, nested.reports / "v10" / "run-s0", members[0])
    (folder / "report.md").touch()
    found = missing(members[:1], nested)
    assert (found.members, found.unreported) == ([], [])


def stop_short(folder: Path, checkpointed: bool) -> Path:
    """Make a finished run one that was killed."""
    (folder / "result.json").unlink()
    (folder / CHECKPOINT).parent.mkdir()
    if checkpointed:
        (folder / CHECKPOINT).touch()
    return folder


def test_the_newest_run_with_a_checkpoint_goes_on(tiny_run, places, members):
    member, root = members[0], places.runs / "v10"
    assert f"checkpoints/{checkpoint.NAME}" == CHECKPOINT
    assert unfinished(member, places) is None and newest_step(member, places) == 0
    old, new, bare = (
        stop_short(write_run(tiny_run, root / name, member), checkpointed)
        for name, checkpointed in (("old", True), ("new", True), ("bare", False))
    )
    stop_short(write_run(tiny_run, root / "other", members[2]), True)
    for seconds, folder in enumerate((old, new, bare), start=1):
        os.utime(folder / "provenance.json", (seconds, seconds))
    assert unfinished(member, places) == new
    assert newest_step(member, places) == 4
    # One that someone trains by its own command is left to them.
    with RunFolder.open(new).claimed():
        assert unfinished(member, places) == old
    write_run(tiny_run, new, member)
    assert unfinished(member, places) == old


# One member


def test_a_member_is_resumed_run_or_left_alone(tiny_run, places, members):
    places.runs.mkdir()
    killed = stop_short(write_run(tiny_run, places.runs / "v10" / "killed", members[0]), True)
    other = stop_short(write_run(tiny_run, places.runs / "v11_1" / "killed", members[3]), True)
    for member in (members[0], members[0], members[1]):
        assert run_member(member, places, partial(stub, tiny_run)) is None
    assert calls(places) == ["v10 seed 0 resumed", "v11_1 seed 0"]
    assert not (killed / CHECKPOINT).exists() and (other / CHECKPOINT).exists()


def failing(error: BaseException, member: Member, places: Places, resume: Path | None) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("the text is gone: put it back"), "the text is gone: put it back"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "it was stopped"),
    ],
)
def test_why_a_member_failed_is_told(places, members, error, told):
    assert run_member(members[0], places, partial(failing, error)) == told


def test_a_resume_that_fails_names_the_folder(tiny_run, places, members):
    folder = stop_short(write_run(tiny_run, places.runs / "v10" / "killed", members[0]), True)
    reason = run_member(members[0], places, partial(failing, UserError("last.pt cannot be read")))
    assert (
        reason
        == f"last.pt cannot be read (it was going on in {folder}; remove that folder, if it is damaged, to start anew)"
    )


def test_who_comes_second_waits_and_finds_the_run(tiny_run, places, members, caplog):
    member, found = members[0], []
    caplog.set_level(logging.INFO)
    asked = asked_fingerprint(member.experiment)[:16]
    with locked(places.ladder / f"v10-s0-{asked}"):
        second = threading.Thread(target=lambda: found.append(run_member(member, places, partial(stub, tiny_run))))
        second.start()
        until(lambda: "waiting for another process" in caplog.text)
        write_run(tiny_run, places.runs / "v10" / "run-s0", member)
    second.join()
    assert found == [None] and calls(places) == []


# Workers


@pytest.mark.parametrize(
    ("cores", "memory", "count", "asked", "expected"),
    [
        (2, 20.0, 10, None, (2, 1)),
        (2, 1.5, 10, None, (1, 2)),
        (8, 3.9, 10, None, (3, 2)),
        (8, 99.0, 3, None, (3, 2)),
        (2, 0.5, 10, None, (1, 2)),
        (2, 20.0, 10, 4, (4, 1)),
        (8, 20.0, 10, 2, (2, 4)),
        (8, 20.0, 1, None, (1, 8)),
    ],
)
def test_how_many_workers(monkeypatch, cores, memory, count, asked, expected):
    """`memory` in units of what a worker is given."""
    member = plan(["v10"], "smoke", seeds=1, overrides=["--train.device=cpu"]).members[0]
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2 * cores)))
    available = int(memory * WORKER_BYTES)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=available))
    assert hire([member] * count, asked, "local") == Crew("local", *expected)


def fails_in_the_middle(template: Path, member: Member, places: Places, resume: Path | None) -> None:
    if member.name == "v11_1 seed 0":
        raise UserError("its text is gone")
    if member.name == "v10 seed 1":
        os.kill(os.getpid(), signal.SIGKILL)
    stub(template, member, places, resume)


@pytest.mark.slow
def test_a_member_that_fails_or_dies_stops_no_other(tiny_run, places, members, caplog):
    places.runs.mkdir()
    caplog.set_level(logging.INFO)
    failed = fan_out(members, places, Crew("local", 2, 1), partial(fails_in_the_middle, tiny_run))
    assert sorted(calls(places)) == ["v10 seed 0", "v11_1 seed 1"]
    assert list(failed) and set(failed) == {"v11_1 seed 0", "v10 seed 1"}
    assert failed["v11_1 seed 0"].startswith("its text is gone (log: ")
    assert failed["v10 seed 1"].startswith("its process ended without a result")
    assert names(missing(members, places).members) == ["v11_1 seed 0", "v10 seed 1"]
    ends = [record.getMessage() for record in caplog.records if " of 4, " in record.getMessage()]
    assert len(ends) == 4 and ends[-1].endswith("[4 of 4, 00:00 left]")
    # The next ladder runs these two, and nothing else.
    assert fan_out(missing(members, places).members, places, Crew("local", 2, 1), partial(stub, tiny_run)) == {}
    assert sorted(calls(places)) == sorted(names(members))


def reports_its_surroundings(template: Path, member: Member, places: Places, resume: Path | None) -> None:
    seen: dict[str, object] = {"cwd": os.getcwd(), "torch": "torch" in sys.modules}
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        seen[name] = os.environ.get(name)
    (places.runs / f"{member.name}.json").write_text(json.dumps(seen))
    stub(template, member, places, resume)


FAKE_SLURM = {
    # The job runs at once, and its number is that of the file, opened here since submitit renames it afterwards.
    "sbatch": 'exec 3< "$1"; nohup bash /dev/fd/3 > /dev/null 2>&1 & echo Submitted batch job $!',
    "srun": 'export SLURM_JOB_ID=$PPID; out=$3; err=$5; shift 5; exec "$@" >> ${out//%[jt]/x} 2>> ${err//%[jt]/x}',
    "sacct": 'printf "JobID|State|NodeList\\n"',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> None:
    """Stand-ins for Slurm's commands, which run a job on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE_SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_slurm_that_is_not_there_is_one_sentence(members, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"^--cluster slurm: there is no srun here, so drop it, .*$"):
        hire(members, cluster="slurm")


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_worker_has_its_threads_and_its_device(tiny_run, places, members, tmp_path, monkeypatch, cluster, slurm):
    """From another folder, as a job of either kind; the stand-ins for Slurm's commands are ours."""
    places.runs.mkdir()
    monkeypatch.chdir(tmp_path)
    crew = Crew(cluster, 2, 3, ("4", "7"))
    assert fan_out(members[:2], places, crew, partial(reports_its_surroundings, tiny_run)) == {}
    seen = [json.loads((places.runs / f"{member.name}.json").read_text()) for member in members[:2]]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in seen] == ["4", "7"]
    for each in seen:
        assert (each["OMP_NUM_THREADS"], each["NUMBA_NUM_THREADS"], each["cwd"]) == ("3", "3", str(tmp_path))
        # Threads and devices are read when torch is first imported.
        assert not each["torch"]


def refuses_one(template: Path, member: Member, places: Places, resume: Path | None) -> None:
    if member.name == "v10 seed 1":
        raise UserError("its text is gone")
    stub(template, member, places, resume)


@pytest.mark.slow
def test_a_ladder_ends_with_reports_that_know_all_seeds_and_a_table(tiny_run, places):
    """Also where a member failed; the next ladder runs it alone. exp(mean log) of 1/2 and 0.55 is sqrt(0.275)."""
    argv = ["--versions=v10,v11_1,v11_9", "--seeds=2", "--scale=smoke", "--train.device=cpu", "--cluster=local"]
    places.runs.mkdir()
    request, session = parse_request(argv), partial(refuses_one, tiny_run)
    first = run_ladder(request, argv, places, session)
    assert (first.members, first.ran) == (4, 3) and list(first.problems) == ["v11_9", "v10 seed 1"]
    assert places.reports / "roadmap.md" in first.written and all(path.is_file() for path in first.written)
    report = places.reports / "v11_1" / "run-s0" / "report.md"
    assert "Over 2 paired seeds" not in report.read_text()

    second = run_ladder(request, argv, places, partial(stub, tiny_run))
    assert (second.members, second.ran) == (4, 1) and list(second.problems) == ["v11_9"]
    assert sorted(calls(places)) == ["v10 seed 0", "v10 seed 1", "v11_1 seed 0", "v11_1 seed 1"]
    assert f"Over 2 paired seeds the perplexity is {0.275**0.5:.4f} times that of v10" in report.read_text()
    reports = {path: path.read_bytes() for path in places.reports.rglob("*") if path.is_file()}

    nothing = partial(failing, AssertionError("there is nothing to run"))
    third = run_ladder(request, argv, places, nothing)
    assert (third.members, third.ran, third.written) == (4, 0, [])
    # A run that no table can count is told of, and not taken for one that is done.
    (run,) = places.runs.glob("v10/*s0")
    shutil.copytree(run, damaged := places.runs / "v10" / "damaged")
    (damaged / "metrics.jsonl").unlink()
    (places.reports / "v10" / "run-s0" / "report.md").unlink()
    fourth = run_ladder(request, argv, places, nothing)
    assert f"{damaged} has no metrics.jsonl, so no table counts it" in fourth.problems["report of damaged"]
    shutil.rmtree(damaged)
    # Made again from the records alone, every report and list has the same bytes.
    shutil.rmtree(places.runs)
    for path in [
        *places.reports.glob("*/*/report.md"),
        *places.reports.glob("*/*/*.png"),
        *places.reports.glob("*/*.md"),
    ]:
        path.unlink()
    assert len(rebuild_reports(["v10", "v11_1"], places.runs, places.reports).reports) == 4
    assert {path: path.read_bytes() for path in places.reports.rglob("*") if path.is_file()} == reports


@pytest.fixture
def recorded(tiny_run, places, members) -> Callable[..., list[Path]]:
    """Looks for what is missing of a ladder whose only member, v10 with seed 0, is recorded; returns what it wrote."""
    folder = write_run(tiny_run, places.reports / "v10" / "run-s0", members[0])
    (folder / "report.md").touch()

    def look(*flags: str, versions: str = "v10", scale: str = "smoke") -> list[Path]:
        argv = [f"--versions={versions}", "--seeds=1", f"--scale={scale}", "--cluster=local", *flags]
        session = partial(failing, UserError("nothing is to run here"))
        return run_ladder(parse_request(argv), argv, places, session).written

    return look


@pytest.mark.parametrize("change", ["record", "page", "figure", "unstamped", "none"])
def test_a_table_that_cannot_know_all_is_written_again(recorded, places, change):
    table = places.reports / "roadmap.md"
    assert table in recorded()
    assert "[v10](v10/README.md)" in table.read_text() and table.read_text().startswith("# The ladder at scale smoke\n")
    # A clone has files of any age.
    os.utime(table, (1, 1))
    if change == "record":
        metrics = places.reports / "v10" / "run-s0" / "metrics.jsonl"
        metrics.write_text(metrics.read_text().partition("\n")[0] + "\n")
    elif change == "page":
        (places.reports / "index.html").unlink()
    elif change == "figure":
        (places.reports / "roadmap" / "validation.png").unlink()
    elif change == "unstamped":
        table.write_text(table.read_text().partition("<!--")[0])
    assert (table in recorded()) == (change != "none")
    assert recorded() == []


STAMP = '<!-- made from {"scale": "smoke", "versions": [], "overrides": [], "records": ""} -->'


@pytest.mark.parametrize(
    "text",
    [
        STAMP[:20].encode(), (STAMP[:30] + " -->").encode(), b"<!-- made from [1] -->",
        STAMP.replace("records", "record").encode(), STAMP.replace("[]", "[1]").encode(), b"\xff\n" + STAMP.encode(),
    ],
)  # fmt: skip
def test_a_damaged_stamp_is_none(tmp_path, text):
    table = tmp_path / "roadmap.md"
    table.write_text(STAMP)
    assert read_stamp(table) == Stamp("smoke", (), (), "")
    table.write_bytes(text)
    assert read_stamp(table) is None


def test_a_stamp_is_read_as_it_was_written(tmp_path):
    stamp = Stamp("smoke", ("v10_steps_2",), ("--student.name", "a>b"), "0" * 64)
    (tmp_path / "roadmap.md").write_text(f"# A table\n{stamp.comment()}\n")
    assert read_stamp(tmp_path / "roadmap.md") == stamp


def test_one_table_is_written_at_a_time(recorded, places, caplog):
    caplog.set_level(logging.INFO)
    with locked(places.ladder / "roadmap.md"):
        second = threading.Thread(target=recorded)
        second.start()
        until(lambda: "waiting for another process" in caplog.text)
        assert not (places.reports / "roadmap.md").exists()
    second.join()
    assert (places.reports / "roadmap.md").exists()


@pytest.mark.parametrize("versions", ["v10", "v10,v11_1"])
def test_a_place_where_nothing_can_be_written_is_one_sentence(recorded, places, versions):
    """Whether a run is missing or none is."""
    places.runs.write_text("not a folder")
    with pytest.raises(UserError, match=r"\.ladder cannot be written \(Not a directory\)"):
        recorded(versions=versions)


def test_a_scale_that_there_is_not_leaves_the_table(recorded, places):
    recorded()
    before = (places.reports / "roadmap.md").read_bytes()
    assert recorded(scale="smokee") == []
    assert (places.reports / "roadmap.md").read_bytes() == before
    with pytest.raises(UserError, match="no table at scale 'smokee': "):
        write_table(places.reports, "smokee")


@pytest.mark.slow
def test_overrides_do_not_outlive_their_request(recorded, places):
    """A table of runs with another rate knows nothing of v10's own run; the next request without it does."""
    table = places.reports / "roadmap.md"
    recorded("--train.device=cpu", "--train.lr=1e-3")
    assert "--train.lr=1e-3" in table.read_text().splitlines()[-1]
    assert table in recorded()
    assert "--train.lr" not in table.read_text()


def test_a_table_made_again_has_the_versions_that_it_had(tiny_run, recorded, places):
    extra = plan(["v11_1_free"], "smoke", seeds=1).members[0]
    (write_run(tiny_run, places.reports / "v11_1_free" / "run-s0", extra) / "report.md").touch()
    recorded(versions="v10,v11_1_free")
    table = places.reports / "roadmap.md"
    before = table.read_bytes()
    assert b"[v11_1_free](" in before
    table.write_text(table.read_text().splitlines()[-1])
    write_table(places.reports)
    assert table.read_bytes() == before


def test_reports_that_a_killed_ladder_owed_are_made(recorded, places):
    report = places.reports / "v10" / "run-s0" / "report.md"
    recorded()
    assert report.read_bytes() == b""
    (places.ladder / OWED).write_text("v10\nv11_1")
    recorded()
    assert report.read_bytes() and not (places.ladder / OWED).exists()


def test_why_a_worker_could_not_begin_is_the_last_line_of_its_trace():
    told = (
        "Job (task=0) failed during processing with trace:\n----------------------\nTraceback (most recent call last):"
        "\n  File \"x.py\", line 1, in <module>\nModuleNotFoundError: No module named 'x'\n\n----------------------\n"
        "You can check full logs with 'job.stderr(0)' and 'job.stdout(0)'or at paths:\n  - a_log.err\n  - a_log.out"
    )
    assert _last_of_trace(told) == "ModuleNotFoundError: No module named 'x'"
    assert _last_of_trace("it is gone") == "it is gone"

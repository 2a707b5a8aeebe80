"""Records beside reports: whole, small, and enough to make every report again byte by byte where there is no runs/."""

import json
import shutil
from pathlib import Path

import pytest

from asnn_goose import cli
from asnn_goose.errors import UserError
from asnn_goose.reporting import read_metrics, write_report
from asnn_goose.reporting.comparison import finished_runs, run_folders
from asnn_goose.reporting.rebuild import find_run, rebuild_reports, versions_with_runs
from asnn_goose.reporting.records import read_raster
from asnn_goose.reporting.run_folder import RECORDS
from asnn_goose.sweep import write_table
from asnn_goose.sweep.members import SCALE
from asnn_goose.sweep.stamp import Stamp, read_stamp

BASE = {"version": "base", "parent": None, "distillation.temperature.mode": "fixed"}


@pytest.fixture(scope="module")
def clone(make_run, tmp_path_factory) -> Path:
    """Folder with runs/ and the reports/ made from it: a base with two seeds, one of them long, and its child."""
    root = tmp_path_factory.mktemp("clone")
    for number, settings in enumerate((BASE, BASE | {"seed": 1}, {"seed": 1})):
        folder = make_run(root / "runs", settings, {"student.test_ppl": 430.0 + number}, hours=number)
        if number == 1:
            for step in range(20, 1020):
                folder.log(step, lr=1e-3, loss_total=5.0, loss_ce_raw=3.0, loss_ce_weighted=3.0)
    assert rebuild_reports(["base", "child"], root / "runs", root / "reports").failures == {}
    return root


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_records_are_the_runs_files_with_thinned_metrics(clone):
    for run in (clone / "runs").glob("*/*"):
        record = clone / "reports" / run.parent.name / run.name
        for name in ("result.json", "config.yaml", "provenance.json", "raster.npz"):
            assert (record / name).read_bytes() == (run / name).read_bytes()
        lines, kept = read_metrics(run / "metrics.jsonl"), read_metrics(record / "metrics.jsonl")
        assert len(kept) == min(200, len(lines)) and kept == [line for line in lines if line in kept]
        if len(lines) <= 200:
            assert (record / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_reports_are_made_again_from_the_records_alone(clone, tmp_path):
    """Every report.md, figure and list is deleted first, and there are no runs."""
    expected = files_below(clone / "reports")
    shutil.copytree(clone / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("*.md", "*.png"))
    assert len(files_below(tmp_path / "reports")) == 3 * (len(RECORDS) + 1)
    rebuilt = rebuild_reports(["base", "child"], tmp_path / "runs", tmp_path / "reports")
    assert (len(rebuilt.reports), rebuilt.incomplete, rebuilt.failures) == (3, {}, {})
    assert files_below(tmp_path / "reports") == expected


def test_the_command_makes_all_reports_or_one(clone, tmp_path, monkeypatch, capfd):
    shutil.copytree(clone / "reports", tmp_path / "whole")
    write_table(tmp_path / "whole")
    expected = files_below(tmp_path / "whole")
    shutil.copytree(clone / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("*.md", "*.png"))
    monkeypatch.setenv("ASNN_GOOSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASNN_GOOSE_REPORTS", str(tmp_path / "reports"))
    (record,) = (tmp_path / "reports" / "child").glob("*/")
    for name in (str(record), f"child/{record.name}"):
        assert cli.command(["report", name]) == 0
        assert capfd.readouterr().out == f"{record / 'report.md'}\n"
        assert (record / "report.md").read_bytes() == expected[f"child/{record.name}/report.md"]
    assert not list((tmp_path / "reports" / "base").glob("*/report.md"))
    assert cli.command(["report", "--all"]) == 0
    assert capfd.readouterr().out == "reports written: 3\n"
    assert files_below(tmp_path / "reports") == expected


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["report"], "error: report : name runs, or give --all"),
        (["report", "--every"], "error: report --every: name runs, or give --all"),
        (["report", "--all", "v10/x"], "error: report --all v10/x: name runs, or give --all"),
        (["report", "v10/nothing"], "error: 'v10/nothing' is no folder, and no finished run below"),
        (["report", "nothing"], "error: 'nothing' is no folder, and no finished run below"),
        ([], "usage: python -m asnn_goose.cli report (--all | RUN ...)"),
        (["train"], "usage: python -m asnn_goose.cli report (--all | RUN ...)"),
    ],
)
def test_a_wrong_command_is_one_sentence(argv, told, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ASNN_GOOSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASNN_GOOSE_REPORTS", str(tmp_path / "reports"))
    assert cli.command(argv) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(told) and printed.err.count("\n") == 1 and printed.out == ""


def test_what_is_damaged_is_told_and_the_rest_is_made(clone, tmp_path, monkeypatch, capfd):
    shutil.copytree(clone / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("*.md", "*.png"))
    monkeypatch.setenv("ASNN_GOOSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASNN_GOOSE_REPORTS", str(tmp_path / "reports"))
    torn, old = sorted((tmp_path / "reports" / "base").iterdir())
    (torn / "result.json").write_bytes((torn / "result.json").read_bytes()[:300])
    (old / "provenance.json").unlink()
    assert cli.command(["report", "--all"]) == 1
    printed = capfd.readouterr()
    assert printed.out == f"reports written: 1\n{old} has no provenance.json, so its report stays as it is\n"
    assert f"{torn}: {torn / 'result.json'} is not the result of a run" in printed.err
    assert [path.parents[1].name for path in (tmp_path / "reports").glob("*/*/report.md")] == ["child"]


def test_a_run_that_is_not_there_stops_no_other(clone, tmp_path, monkeypatch, capfd):
    shutil.copytree(clone / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("*.md", "*.png"))
    monkeypatch.setenv("ASNN_GOOSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASNN_GOOSE_REPORTS", str(tmp_path / "reports"))
    (record,) = (tmp_path / "reports" / "child").glob("*/")
    assert cli.command(["report", "v10/one", str(record), "v10/two"]) == 2
    printed = capfd.readouterr()
    assert printed.out == f"{record / 'report.md'}\n" and (record / "report.md").is_file()
    first, second = printed.err.splitlines()
    assert first.startswith("error: 'v10/one' is no folder") and second.startswith("error: 'v10/two' is no folder")


def test_a_table_of_a_scale_that_is_gone_is_made_at_the_usual_one(clone, tmp_path, monkeypatch, capfd):
    """What else went wrong is told before."""
    shutil.copytree(clone / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("*.md", "*.png"))
    monkeypatch.setenv("ASNN_GOOSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASNN_GOOSE_REPORTS", str(tmp_path / "reports"))
    torn = min((tmp_path / "reports" / "base").iterdir()) / "result.json"
    torn.write_text("{")
    table = tmp_path / "reports" / "roadmap.md"
    table.write_text(Stamp("bygone", ("v11_1_free",), (), "0" * 64).comment())
    assert cli.command(["report", "--all"]) == 1
    told = capfd.readouterr().err
    assert told.index(f"{torn} is not the result of a run") < told.index("no table at scale 'bygone': ")
    assert table.read_text().startswith(f"# The ladder at scale {SCALE}\n")
    stamp = read_stamp(table)
    assert stamp is not None and stamp[:3] == (SCALE, ("v11_1_free",), ())


@pytest.mark.parametrize("file", ["config.yaml", "raster.npz", "metrics.jsonl", "provenance.json"])
def test_any_torn_file_is_one_sentence(clone, tmp_path, file):
    shutil.copytree(clone / "reports", tmp_path / "reports")
    (record,) = (tmp_path / "reports" / "child").glob("*/")
    (record / file).write_bytes(b"\xff\x00{\n\n" + (record / file).read_bytes()[:50])
    rebuilt = rebuild_reports(["base", "child"], tmp_path / "runs", tmp_path / "reports")
    assert len(rebuilt.reports) == 2 and list(rebuilt.failures) == [record]
    assert str(record / file) in rebuilt.failures[record] and "\n" not in rebuilt.failures[record]


def test_a_flipped_bit_in_a_raster_is_one_sentence_or_none(clone, tmp_path):
    (record,) = (clone / "reports" / "child").glob("*/")
    whole, file = (record / "raster.npz").read_bytes(), tmp_path / "raster.npz"
    refused = 0
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 0x10
        file.write_bytes(content)
        try:
            read_raster(file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(whole) // 2


def test_a_version_whose_records_are_not_whole_has_its_list_made_again(clone, tmp_path):
    shutil.copytree(clone / "reports", tmp_path / "reports")
    (record,) = (tmp_path / "reports" / "child").glob("*/")
    (record / "provenance.json").unlink()
    listed = tmp_path / "reports" / "child" / "README.md"
    expected = listed.read_text()
    listed.write_text("stale")
    assert rebuild_reports(["child"], tmp_path / "runs", tmp_path / "reports").reports == []
    assert listed.read_text() == expected


def test_the_run_mends_a_torn_record(clone, tmp_path):
    expected = files_below(clone / "reports")
    shutil.copytree(clone, tmp_path, dirs_exist_ok=True)
    (record,) = (tmp_path / "reports" / "child").glob("*/")
    (record / "result.json").write_text("{")
    assert rebuild_reports(["child"], tmp_path / "runs", tmp_path / "reports").failures == {}
    assert files_below(tmp_path / "reports") == expected


def test_one_place_to_read_from(make_run, tmp_path):
    runs, reports = tmp_path / "runs", tmp_path / "reports"
    run = make_run(runs)
    record = reports / "child" / run.run_id
    assert run_folders("child", runs, reports) == {run.run_id: [run.path]}
    assert find_run(f"child/{run.run_id}", runs, reports) == run.path
    write_report(run.path, reports, runs)
    assert run_folders("child", runs, reports) == {run.run_id: [record, run.path]}
    assert find_run(f"child/{run.run_id}", runs, reports) == record
    assert find_run(str(run.path), runs, reports) == run.path
    # A record of earlier days, with less in it, comes behind the run.
    (record / "metrics.jsonl").unlink()
    assert run_folders("child", runs, reports) == {run.run_id: [run.path, record]}
    assert versions_with_runs(runs, reports) == ["child"]
    with pytest.raises(UserError, match="is no folder, and no finished run below"):
        find_run("child/other", runs, reports)


def test_a_copy_of_a_record_neither_takes_its_place_nor_hides(make_run, tmp_path):
    runs, reports = tmp_path / "runs", tmp_path / "reports"
    run = make_run(runs)
    write_report(run.path, reports, runs)
    record = reports / "child" / run.run_id
    before, copy = (record / "result.json").read_bytes(), record.with_name(f"{run.run_id}-copy")
    shutil.copytree(record, copy)
    found = json.loads(before)
    found["student"]["test_ppl"] += 1.0
    (copy / "result.json").write_text(json.dumps(found))
    told = rebuild_reports(["child"], tmp_path / "none", reports).failures
    assert list(told) == [copy] and told[copy].endswith(f"calls itself child/{run.run_id}: put it there, or remove it.")
    assert (record / "result.json").read_bytes() == before
    assert [each.folder for each in finished_runs("child", runs, reports)] == [record, copy]


def test_a_damaged_run_is_warned_of_once(make_run, tmp_path, caplog):
    run = make_run(tmp_path / "runs")
    run.result.write_text(json.dumps({"version": "child"}))
    for _ in range(3):
        assert finished_runs("child", tmp_path / "runs", tmp_path / "reports") == []
    assert len(caplog.records) == 1 and str(run.result) in caplog.text

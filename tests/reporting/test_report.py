import json
import shutil
from pathlib import Path

import pytest

from asnn_goose.errors import UserError
from asnn_goose.reporting import load_result, report_head, write_report
from asnn_goose.reporting.alarms import find_alarms
from asnn_goose.reporting.comparison import load_run
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.provenance import collect_provenance
from asnn_goose.reporting.report import FIGURES, render, render_index

DENSE = {"student.neuron.kind": "dense", "student.hidden_neuron.kind": "dense"}
BASE = {"version": "base", "parent": None, "distillation.temperature.mode": "fixed", "train.lr": 0.001}
# Fields whose place in the report is a figure, or another file's.
ELSEWHERE = ("spikes.per_layer", "raster", "started", "run_id", "fingerprint", "version", "parent", "schema")


@pytest.fixture(scope="module")
def written(make_run, tmp_path_factory):
    """A child, its parent and its dense twin, with the reports of child and parent."""
    root = tmp_path_factory.mktemp("report")
    roots = root / "reports", root / "runs"
    parent = make_run(roots[1], BASE, {"student.test_ppl": 438.7})
    make_run(
        roots[1], DENSE | {"train.lr": 0.001}, {"spikes": None, "student.test_ppl": 351.3, "raster": None}, hours=1
    )
    child = make_run(roots[1], {"train.lr": 0.001}, hours=2, overrides={"train.lr": 0.001})
    return root, write_report(child.path, *roots), write_report(parent.path, *roots), child


def numbers(tree, name=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{name}.{key}" if name else key)
    elif isinstance(tree, int | float) and not isinstance(tree, bool) and not name.startswith(ELSEWHERE):
        yield name


def test_everything_lies_beside_the_report(written):
    root, report, _, child = written
    assert report == root / "reports" / "child" / child.run_id / "report.md"
    names = {path.name for path in report.parent.iterdir()}
    assert names == {"report.md", "result.json", "config.yaml", *(f"{name}.png" for name in FIGURES)}
    assert load_result(report.parent / "result.json") == load_result(child.result)
    text = report.read_text()
    assert all(f"]({name}.png)" in text for name in FIGURES)


def test_sections_come_in_order(written):
    titles = [line[3:] for line in written[1].read_text().splitlines() if line.startswith("## ")]
    assert titles == [
        "Result", "Curves", "Spikes", "Energy", "Cost", "A sample", "Alarms", "Configuration", "Provenance",
    ]  # fmt: skip


def test_parent_twin_change_override_and_command_are_told(written):
    text = written[1].read_text()
    assert "No clear difference from base: base stands at 438.7" in text
    assert "| dense twin | 351.3 |" in text
    assert "| `distillation.temperature.mode` | `fixed` | `learned` |" in text
    assert "| `train.lr` | `0.001` |" in text
    assert "python experiments/child.py --scale=cpu --seed=0 --train.lr=0.001" in text
    assert "Step 7 was skipped" in text and "Decay, in-context rate, kappa" in text


def test_a_fixed_temperature_has_a_sentence_and_no_figure(written):
    text = written[2].read_text()
    assert "fixed at 2." in text and not (written[2].parent / "temperature.png").exists()


def test_a_second_time_gives_the_same_bytes(written):
    root, _, _, child = written
    before = {path: path.read_bytes() for path in (root / "reports").rglob("*") if path.is_file()}
    write_report(child.path, root / "reports", root / "runs")
    assert {path: path.read_bytes() for path in (root / "reports").rglob("*") if path.is_file()} == before


def test_no_filler(written):
    for report in written[1:3]:
        words = report.read_text().replace("|", " ").split()
        assert not {"None", "nan", "inf", "n/a", "N/A", "TODO"} & set(words)


def test_every_number_of_the_result_reaches_the_report(written, make_experiment):
    """Change one number of result.json: the report changes. So none is written from elsewhere."""
    run = load_run(written[3].path)
    provenance = collect_provenance(run.experiment, "0" * 64, argv=[], overrides={})

    def text(result):
        changed = type(run)(run.folder, result, run.experiment)
        alarms = find_alarms(result, [], run.experiment)
        figures = {name: f"{name}.png" for name in FIGURES}
        return render(Material(changed, provenance, alarms, None, {}, figures))

    tree = json.loads(run.result.model_dump_json())
    names = list(numbers(tree))
    assert len(names) > 40
    silent = []
    for name in names:
        changed = json.loads(json.dumps(tree))
        *path, last = name.split(".")
        branch = changed
        for part in path:
            branch = branch[part]
        branch[last] = type(branch[last])(branch[last] * 1.37 + 1)
        if text(type(run.result).model_validate(changed)) == text(run.result):
            silent.append(name)
    assert silent == []


def test_the_list_of_a_version_needs_the_reports_alone(written, tmp_path):
    root, report, _, child = written
    shutil.copytree(root / "reports", tmp_path / "reports")
    text = render_index("child", tmp_path / "reports")
    assert text == (report.parent.parent / "README.md").read_text()
    assert f"| [{child.run_id}]({child.run_id}/report.md) | cpu | 0 | ternary | 20,480 | 421.3 |" in text


def test_a_fresh_clone_still_compares_with_the_parent(written, tmp_path):
    root, _, _, child = written
    shutil.copytree(root / "reports" / "base", tmp_path / "reports" / "base")
    shutil.copytree(child.path, tmp_path / "runs" / "child" / child.run_id)
    again = write_report(tmp_path / "runs" / "child" / child.run_id, tmp_path / "reports", tmp_path / "runs")
    assert "base stands at 438.7" in again.read_text() and "dense twin" not in again.read_text()


def test_a_dense_run_without_spikes_loses_its_old_figures(make_run, tmp_path):
    folder = make_run(tmp_path / "runs", DENSE | {"parent": None}, {"spikes": None, "raster": None})
    target = tmp_path / "reports" / "child" / folder.run_id
    target.mkdir(parents=True)
    (target / "spikes.png").write_text("old")
    text = write_report(folder.path, tmp_path / "reports", tmp_path / "runs").read_text()
    assert "## Spikes" not in text and not (target / "spikes.png").exists()


def test_an_unfinished_run_is_refused(make_run, tmp_path):
    folder = make_run(tmp_path / "runs")
    folder.result.unlink()
    with pytest.raises(UserError, match=r"result\.json does not exist: the run did not finish"):
        write_report(folder.path, tmp_path / "reports", tmp_path / "runs")
    assert not (tmp_path / "reports").exists()


def test_a_lost_raster_is_named(make_run, tmp_path):
    folder = make_run(tmp_path / "runs")
    (folder.path / "raster.npz").unlink()
    with pytest.raises(UserError, match=r"raster\.npz does not exist"):
        write_report(folder.path, tmp_path / "reports", tmp_path / "runs")


def test_head_is_the_beginning(written):
    report: Path = written[1]
    head = report_head(report, 5)
    assert report.read_text().startswith(head) and head.splitlines()[0] == "# child: scale cpu, seed 0"
    assert len(head.splitlines()) == 5

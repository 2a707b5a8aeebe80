import json
import shutil
from pathlib import Path

import pytest

from asnn_goose.errors import UserError
from asnn_goose.reporting import load_result, report_head, write_report
from asnn_goose.reporting.alarms import find_alarms
from asnn_goose.reporting.comparison import FinishedRun, load_run
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.provenance import collect_provenance
from asnn_goose.reporting.report import FIGURES, render, render_index
from asnn_goose.reporting.run_folder import RECORDS

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
        roots[1],
        DENSE | {"train.lr": 0.001},
        {"spikes": None, "information": None, "student.test_ppl": 351.3, "raster": None},
        hours=1,
    )
    child = make_run(roots[1], {"train.lr": 0.001}, hours=2, overrides={"train.lr": 0.001})
    before = write_report(parent.path, *roots)
    return root, write_report(child.path, *roots), before, child


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
    assert names == {"report.md", "raster.npz", *RECORDS, *(f"{name}.png" for name in FIGURES)}
    assert load_result(report.parent / "result.json") == load_result(child.result)
    text = report.read_text()
    assert all(f"]({name}.png)" in text for name in FIGURES)


def test_sections_come_in_order(written):
    titles = [line[3:] for line in written[1].read_text().splitlines() if line.startswith("## ")]
    assert titles == [
        "Result", "Curves", "Spikes", "What the spikes carry", "Energy", "Cost", "A sample", "Alarms", "Configuration",
        "Provenance",
    ]  # fmt: skip


def test_parent_twin_change_override_and_command_are_told(written):
    text = written[1].read_text()
    assert "No clear difference from base: base stands at 438.7" in text
    assert "| dense twin | 351.3 |" in text
    assert "| `distillation.temperature.mode` | `fixed` | `learned` |" in text
    assert "| `train.lr` | `0.001` |" in text
    assert "python experiments/child.py --scale=cpu --seed=0 --train.lr=0.001" in text
    assert (
        "Step 7 was skipped" in text and "Decay, in-context rate, gate, kappa, the recurrent state, the norms" in text
    )


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


def test_energy_is_told_by_kind_by_format_and_apart_from_memory(written):
    section = written[1].read_text().split("## Energy")[1].split("##")[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    mixer, head, both = (next(row for row in table if row[0] == name) for name in ("mixer matrices", "head", "**all**"))
    assert mixer[1:] == ["15.9 M", "96.9 %", "12.6 M", "20.0 k", "13.1 M", "11.8 µJ", "31.8 MB"]
    assert head[3:5] == ["", ""] and both[1:3] == ["44.2 M", "37.1 %"] and both[6] == "153 µJ"
    assert ["attention", "2.90 M", "0 %", "3.10 M", "14.0 µJ"] in table
    assert "at 4.6 pJ per multiply accumulate, 3.7 pJ per multiplication, 0.9 pJ per addition" in section
    assert "int8 (0.2 and 0.03 pJ) 7.10 µJ and 31.0 µJ." in section
    assert "as one multiply-accumulate where it is not 0 the student takes 161 µJ" in section
    # 95 MB and 269 MB at 162.5 and 325 pJ a byte.
    assert "95.0 MB a token, the teacher 269 MB. From DRAM at 162.5 to 325 pJ per byte" in section
    assert "it would take 15.4 mJ to 30.9 mJ and 43.7 mJ to 87.4 mJ." in section


def test_levels_without_spikes_are_no_spikes_and_are_multiplied(written, make_experiment):
    """161 µJ is the fixture's energy with counts multiplied, 619 µJ the teacher's; 52.7 % its zero operands."""
    run = load_run(written[3].path)
    twin = make_experiment({f"student.{neuron}.kind": "quantised" for neuron in ("neuron", "hidden_neuron")})
    provenance = collect_provenance(twin, "0" * 64, argv=[], overrides={})
    text = render(Material(FinishedRun(run.folder, run.result, twin), provenance, [], None, {}, {}))
    levels = text.split("## Levels")[1].split("##")[0]
    assert "| zero operands: tokens x channels whose level is 0 | 52.7 % |" in levels
    assert "## Spikes" not in text and "micro-step" not in levels
    assert "an estimated 161 µJ per token, the teacher's 619 µJ: 0.260 times" in text
    assert "The quantised neuron does not spike: each of its levels is an operand to multiply with." in text
    # What a level would take if it were unfolded is in the table alone.
    assert "int8" not in text and "as one multiply-accumulate" not in text


def test_the_list_of_a_version_needs_the_reports_alone(written, tmp_path):
    root, report, _, child = written
    shutil.copytree(root / "reports", tmp_path / "reports")
    text = render_index("child", tmp_path / "reports")
    assert text == (report.parent.parent / "README.md").read_text()
    assert f"| [{child.run_id}]({child.run_id}/report.md) | cpu | 0 | ternary | 20,480 | 421.3 |" in text


def test_seeds_reach_the_report_and_the_list(make_run, tmp_path):
    """Child, parent and root with seeds 0, 1 and, but for the parent, 2; the numbers are scipy.stats.ttest_rel's."""
    reports, runs = tmp_path / "reports", tmp_path / "runs"
    fixed = {"distillation.temperature.mode": "fixed"}
    for settings, ppls in (
        (fixed | {"version": "root", "parent": None}, (440.0, 452.0, 431.0)),
        (fixed | {"version": "base", "parent": "root", "student.layers": 5}, (430.0, 460.0)),
        ({"student.layers": 5}, (401.0, 411.0)),
    ):
        for seed, ppl in enumerate(ppls):
            make_run(reports, settings | {"seed": seed}, {"student.test_ppl": ppl})
    last = make_run(runs, {"student.layers": 5, "seed": 2}, {"student.test_ppl": 393.0})
    report = write_report(last.path, reports, runs)
    assert (
        "Over 2 paired seeds the perplexity is 0.9128 times that of base (95 % interval 0.6954 to 1.198): no "
        "difference shown. Over 3 paired seeds the perplexity is 0.9108 times that of root (95 % interval 0.9075 to "
        "0.9142): child helps. Intervals over seeds cover initialisation and data order, not the choice of test text, "
        "and each is of one comparison: the ladder's table corrects for their number. "
        "After 20,480 training tokens" in report.read_text()
    )
    assert report.read_text() == write_report(last.path, reports, runs).read_text()
    lines = (report.parents[1] / "README.md").read_text().splitlines()
    both = "`student.layers`, `distillation.temperature.mode`"
    assert {
        "| cpu | 65,280 | 3 | 401.6 | 379.8 to 424.6 |",
        "| cpu | base | 2 | 0.9128 | 0.6954 to 1.198 | no difference shown | `distillation.temperature.mode` |",
        f"| cpu | root | 3 | 0.9108 | 0.9075 to 0.9142 | helps | {both} |",
    } < set(lines)


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

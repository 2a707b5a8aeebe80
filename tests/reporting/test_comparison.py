import json
import shutil
from dataclasses import replace

import pytest

from asnn_goose.reporting.comparison import (
    FinishedRun,
    changed_settings,
    comparison_sentences,
    find_parent,
    find_twins,
    finished_runs,
    load_run,
    verdict,
)

PARENT = {"version": "base", "parent": None, "distillation.temperature.mode": "fixed"}


@pytest.fixture
def pair(make_experiment, make_result, tmp_path):
    """Child and parent with given test perplexity and interval."""

    def make(mine, theirs, settings=None, results=None):
        def run(name, numbers, settings, results):
            keys = ("student.test_ppl", "student.test_ppl_low", "student.test_ppl_high")
            changes = dict(zip(keys, numbers, strict=True)) | {"run_id": name} | results
            return FinishedRun(tmp_path / name, make_result(changes), make_experiment(settings))

        base = {"version": "base", "parent": None} | (results or {})
        return run("a", mine, {}, {}), run("b", theirs, PARENT | (settings or {}), base)

    return make


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ((90, 85, 95), (100, 96, 105), "better"),
        ((110, 106, 115), (100, 96, 105), "worse"),
        ((90, 85, 96), (100, 96, 105), "cannot tell"),
        ((110, 105, 115), (100, 96, 105), "cannot tell"),
        ((100, 80, 120), (100, 96, 105), "cannot tell"),
        ((50, None, None), (100, 96, 105), "cannot tell"),
        ((50, 49, 51), (100, None, None), "cannot tell"),
    ],
)
def test_verdict_needs_disjoint_intervals(pair, mine, theirs, expected):
    assert verdict(*pair(mine, theirs)) == expected


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        (
            (90, 85, 95),
            (100, 96, 105),
            "Better than base: base stands at 100.0 (95 % interval 96.00 to 105.0), this run is 10.0 % lower, and the "
            "95 % intervals do not overlap. They cover the choice of test text, not the spread between seeds.",
        ),
        ((110, 106, 115), (100, 96, 105), "Worse than base: base stands at 100.0"),
        (
            (104, 99, 109),
            (100, 96, 105),
            "this run is 4.0 % higher, and the 95 % intervals overlap, so one seed cannot",
        ),
        ((100, 99, 109), (100, 96, 105), "this run is no better and no worse."),
        ((104, None, None), (100, 96, 105), "an interval was not measured for both, so one seed cannot tell."),
    ],
)
def test_sentences_follow_the_numbers(pair, mine, theirs, told):
    run, parent = pair(mine, theirs)
    text = comparison_sentences(run, parent)
    assert told in text
    opposites = {"Better", "Worse", "No clear difference"} - {text.split(" than ")[0].split(" from ")[0]}
    assert len(opposites) == 2 and not any(word in text for word in opposites)


@pytest.mark.parametrize(
    ("settings", "results", "named"),
    [
        ({"data.window": 128}, {}, "`data.window`"),
        ({"train.test_tokens": 1000}, {}, "`train.test_tokens`"),
        ({}, {"evaluation.test_tokens": 1000}, "`evaluation.test_tokens`"),
    ],
)
def test_other_test_text_forbids_a_verdict(pair, settings, results, named):
    run, parent = pair((50, 49, 51), (100, 96, 105), settings, results)
    assert verdict(run, parent) == "not comparable"
    text = comparison_sentences(run, parent)
    assert named in text and "not comparable" in text and "Better" not in text and "lower" not in text


def test_what_weakens_a_comparison_is_said(pair):
    run, parent = pair((90, 85, 95), (100, 96, 105), {"train.lr": 0.1}, {"seed": 3, "tokens_seen": 9999})
    text = comparison_sentences(run, parent, {"train.lr": 2e-3})
    assert "The run of base has seed 3, this one 0." in text
    assert "The run of base saw 9,999 training tokens, this one 20,480." in text
    assert "Given on the command line and different too: `train.lr`." in text


def test_a_picked_group_counts_as_an_override_of_its_keys(pair):
    run, parent = pair((90, 85, 95), (100, 96, 105), {"student.layers": 2, "train.lr": 0.1})
    assert "different too: `student.layers`." in comparison_sentences(run, parent, ["student"])
    assert "command line" not in comparison_sentences(run, parent, ["stud", "train.lr_end", "data"])


def test_a_matching_parent_differs_in_the_change_alone(pair):
    run, parent = pair((90, 85, 95), (100, 96, 105))
    ending = "the spread between seeds. Their settings differ in `distillation.temperature.mode`."
    assert comparison_sentences(run, parent, {"train.lr": 2e-3}).endswith(ending)


def test_settings_of_former_days_and_another_arithmetic_are_said(pair):
    """No flag tells of a default that was another one when the parent ran, nor of what a machine computes in."""
    neurons = {"student.neuron.steps": 2, "student.neuron.threshold": 1.0, "train.precision": "bfloat16"}
    run, parent = pair((90, 85, 95), (100, 96, 105), neurons, {"precision": "bfloat16"})
    run = replace(run, result=run.result.model_copy(update={"precision": "float32"}))
    text = comparison_sentences(run, parent)
    assert "The run of base multiplied matrices in bfloat16, this one in float32, which alone moves a" in text
    assert "Their settings differ in `student.neuron.*`, `distillation.temperature.mode`." in text


def test_changed_settings_are_those_that_change_numbers(pair):
    run, parent = pair((1, 1, 1), (2, 2, 2), {"train.log_every": 3, "seed": 4, "student.neuron.steps": 2})
    assert changed_settings(parent, run) == {
        "student.neuron.steps": (2, 4),
        "distillation.temperature.mode": ("fixed", "learned"),
    }


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        # (settings, results, hours): newest, own seed before newer, own scale only, no twin, no foreign override.
        ([({}, {}, 1), ({}, {}, 2)], 1),
        ([({}, {}, 1), ({"seed": 3}, {}, 2)], 0),
        ([({"seed": 2}, {}, 1), ({"seed": 3}, {}, 2)], 1),
        ([({}, {}, 1), ({"train.scale": "gpu"}, {}, 2)], 0),
        ([({"train.scale": "gpu"}, {}, 2)], None),
        ([({"seed": 3}, {}, 1), ({"student.neuron.kind": "dense"}, {}, 2)], 0),
        ([({"seed": 3}, {}, 1), ({"train.lr": 0.1}, {}, 2)], 0),
        ([], None),
    ],
)
def test_the_nearest_run_of_the_parent_is_chosen(make_run, tmp_path, candidates, chosen):
    run = load_run(make_run(tmp_path / "runs").path)
    folders = [make_run(tmp_path / "runs", PARENT | more, results, hours) for more, results, hours in candidates]
    found = find_parent(run, tmp_path / "runs", tmp_path / "reports")
    assert found is None if chosen is None else found is not None and found.folder == folders[chosen].path


def test_a_parent_is_found_among_reports(make_run, tmp_path):
    run = load_run(make_run(tmp_path / "runs").path)
    copy = make_run(tmp_path / "reports", PARENT)
    found = find_parent(run, tmp_path / "runs", tmp_path / "reports")
    assert found is not None and found.folder == copy.path


def test_a_run_in_both_places_is_read_from_its_record(make_run, tmp_path):
    make_run(tmp_path / "runs")
    record = make_run(tmp_path / "reports")
    runs = finished_runs("child", tmp_path / "runs", tmp_path / "reports")
    assert [run.folder for run in runs] == [record.path]


def test_a_base_version_has_no_parent(make_run, tmp_path):
    assert find_parent(load_run(make_run(tmp_path, PARENT).path), tmp_path, tmp_path) is None


def test_unfinished_and_damaged_runs_are_left_out(make_run, tmp_path, caplog):
    make_run(tmp_path, hours=1).result.unlink()
    damaged = make_run(tmp_path, hours=2)
    damaged.result.write_text(json.dumps({"version": "child"}))
    good = make_run(tmp_path, hours=3)
    shutil.copytree(make_run(tmp_path, PARENT).path, stray := tmp_path / "child" / "mine")
    assert [run.folder for run in finished_runs("child", tmp_path, tmp_path)] == [good.path]
    assert str(damaged.result) in caplog.text
    assert f"{stray} is a run of {PARENT['version']}: put it where it belongs (left out)" in caplog.text


def test_twins_differ_in_the_neurons_alone(make_run, tmp_path):
    run = load_run(make_run(tmp_path).path)
    dense = {"student.neuron.kind": "dense", "student.hidden_neuron.kind": "dense"}
    make_run(tmp_path, dense | {"seed": 5}, hours=3)
    twin = make_run(tmp_path, dense, hours=1)
    make_run(tmp_path, dense | {"train.lr": 0.1}, hours=2)
    make_run(tmp_path, {"student.neuron.kind": "quantised", "train.scale": "gpu"}, hours=2)
    make_run(tmp_path, {"student.neuron.steps": 2}, hours=4)
    twins = find_twins(run, tmp_path, tmp_path)
    assert {kind: twin.folder for kind, twin in twins.items()} == {"dense": twin.path}

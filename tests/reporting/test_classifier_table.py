"""The table of classifiers: means, differences and verdicts against scipy, from made-up records."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from asnn_goose.config import dump, load_classifier_experiment
from asnn_goose.errors import UserError
from asnn_goose.reporting.classifier_record import (
    ClassifierResult,
    FinetunedResult,
    Score,
    SentenceEnergy,
    StudentScores,
    TaskResult,
)
from asnn_goose.reporting.classifier_runs import recorded_classifiers, seeds_alike
from asnn_goose.reporting.classifier_table import write_classifier_table
from asnn_goose.reporting.record_base import read_result
from asnn_goose.reporting.statistics import mean_of

START = datetime(2026, 11, 26, tzinfo=UTC)


def _score(right: int) -> Score:
    share = right / 100
    return Score(
        accuracy=share, accuracy_low=share - 0.05, accuracy_high=share + 0.05, macro_f1=share - 0.01,
        macro_f1_low=share - 0.06, macro_f1_high=share + 0.04, confusion=((right, 100 - right), (0, 0)),
    )  # fmt: skip


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Puts down the records of a run that named so many of 100 test texts rightly."""

    def record(
        version: str, seed: int, right: int, task: str = "reviews", hours: int = 0, teacher: int = 90, **flags: Any
    ) -> Path:
        argv = ["--scale=cpu", f"--seed={seed}", f"--task.name={task}"]
        argv += [f"--{key.replace('__', '.')}={value}" for key, value in flags.items()]
        experiment = load_classifier_experiment(version, argv).experiment
        folder = tmp_path / version / f"{task}-{seed}-{hours}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(experiment), encoding="utf-8")
        result = ClassifierResult(
            run_id=folder.name, version=version, parent=experiment.parent, seed=seed,
            fingerprint=f"{version} {folder.name} {right}", scale="cpu",
            started=START + timedelta(hours=hours), steps=10, texts_seen=160, wall_seconds=600.0,
            seconds_by_phase={"preparation": 999.0, "training": 500.0, "evaluation": 40.0},
            task=TaskResult(
                name=task, licence="none", labels=("a", "b"), counts={"test": (100, 0)}, truncated={"test": 0},
                window=64, copies=0,
            ),
            teacher=FinetunedResult(name="minilm", parameters=5, epochs=2, validation=_score(90), test=_score(teacher)),
            student=StudentScores(
                parameters=5, trained_parameters=5, blocks=2, validation=_score(right), test=_score(right)
            ),
            ratio_to_teacher=right / teacher,
            energy=SentenceEnergy(tokens=9.0, student_joules=1.0, teacher_joules=4.0),
        )  # fmt: skip
        (folder / "result.json").write_text(result.model_dump_json(), encoding="utf-8")
        return folder

    return record


def _rows(root: Path) -> dict[str, list[str]]:
    path = write_classifier_table(root)
    assert path is not None
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    return {line.split("]")[0][3:]: [cell.strip() for cell in line.strip("|").split("|")] for line in lines}


def test_differences_are_paired_by_seed_and_tested_as_scipy_does(record, tmp_path):
    base, child = (80, 82, 85, 83), (70, 71, 76, 72)
    for seed, (one, other) in enumerate(zip(base, child, strict=True)):
        record("v17_two_stage", seed, one)
        record("v17_no_stage1", seed, other)
    row = _rows(tmp_path)["v17_no_stage1"]
    points = np.array(child) - np.array(base)
    test: Any = stats.ttest_1samp(points, 0)
    low, high = test.confidence_interval()
    assert f"{points.mean():+.1f} ({low:+.1f} to {high:+.1f})" in row and "hurts" in row
    found = mean_of(points.astype(float))
    assert found == pytest.approx((points.mean(), low, high, test.pvalue))
    assert f"{np.mean(child):.1f} %" in row[3] and row[2] == "4" and "0.250" in row
    assert "base" in _rows(tmp_path)["v17_two_stage"]


def test_a_difference_within_the_noise_and_one_seed_are_said_to_be_so(record, tmp_path):
    for seed, right in enumerate((80, 82)):
        record("v17_two_stage", seed, right)
        record("v17_no_features", seed, 161 - right)
    record("v17_ce_only", 0, 60)
    rows = _rows(tmp_path)
    assert "no difference shown" in rows["v17_no_features"]
    assert "one seed" in rows["v17_ce_only"] and "-20.0" in rows["v17_ce_only"]


def test_an_arm_whose_parent_did_not_run_on_the_task_says_so(record, tmp_path):
    record("v17_two_stage", 0, 80, task="reuters_r8")
    record("v17_exits", 0, 80)
    assert "parent without runs" in _rows(tmp_path)["v17_exits"]


def test_an_arm_is_compared_with_runs_that_differ_in_its_change_alone(record, tmp_path):
    for seed, right in enumerate((80, 82)):
        record("v17_two_stage", seed, right)
        record("v17_no_stage1", seed, right - 10, train__lr=1e-3)
    row = _rows(tmp_path)["v17_no_stage1"]
    assert "not comparable" in row and not any(cell.startswith(("+", "-")) for cell in row)
    record("v17_two_stage", 0, 60, hours=1, train__lr=1e-3)
    row = _rows(tmp_path)["v17_no_stage1"]
    assert "one seed" in row and "+10.0" in row


def test_another_file_of_the_same_name_is_another_task(record, tmp_path):
    record("v17_two_stage", 0, 80, task__source="files", task__path="/a/reviews.csv")
    record("v17_no_stage1", 0, 70, task__source="files", task__path="/b/reviews.csv")
    assert "not comparable" in _rows(tmp_path)["v17_no_stage1"]


def test_of_several_settings_those_with_most_seeds_count(record, tmp_path):
    record("v17_two_stage", 0, 80)
    record("v17_two_stage", 1, 82)
    record("v17_two_stage", 0, 20, hours=5, train__lr=1e-6)
    record("v17_two_stage", 1, 84, hours=6)
    runs = recorded_classifiers(tmp_path, "v17_two_stage")
    assert [[run.result.student.test.accuracy for run in group] for group in seeds_alike(runs)] == [[0.8, 0.84], [0.2]]


def test_runs_with_another_teacher_are_named(record, tmp_path):
    for seed in range(3):
        record("v17_two_stage", seed, 80)
        record("v17_no_stage1", seed, 78, teacher=88)
    _rows(tmp_path)
    told = (tmp_path / "classification.md").read_text()
    assert "minilm reaches 90.0 % (85.0 % to 95.0 %); another" in told
    assert "the one of v17_no_stage1 (seed 0, 1, 2), 88.0 % (83.0 % to 93.0 %)." in told


def test_an_arm_is_compared_with_runs_that_learnt_from_its_teacher(record, tmp_path):
    for seed in range(3):
        record("v17_two_stage", seed, 70 + seed, teacher=88)
        record("v17_two_stage", seed, 80 + seed, hours=1)
        record("v17_no_stage1", seed, 66 + seed, teacher=88)
    rows = _rows(tmp_path)
    assert rows["v17_two_stage"][3].startswith("81.0 %")
    assert rows["v17_no_stage1"][6] == "v17_two_stage (71.0 %)" and rows["v17_no_stage1"][7].startswith("-4.0 ")
    record("v17_exits", 0, 80, teacher=85)
    assert "not comparable" in _rows(tmp_path)["v17_exits"]


def test_what_all_runs_share_is_not_in_the_time_of_one(record, tmp_path):
    record("v17_two_stage", 0, 80)
    assert _rows(tmp_path)["v17_two_stage"][-1] == "9 min 00 s"


def test_an_interval_of_accuracies_ends_at_100_percent(record, tmp_path):
    for seed, right in enumerate((99, 100, 97)):
        record("v17_two_stage", seed, right)
    assert _rows(tmp_path)["v17_two_stage"][3].endswith("to 100.0 %)")


def test_a_damaged_record_is_left_out_and_named(record, tmp_path, caplog):
    record("v17_two_stage", 0, 80)
    torn = record("v17_two_stage", 1, 80)
    (torn / "result.json").write_text("{", encoding="utf-8")
    assert _rows(tmp_path) == _rows(tmp_path)
    assert _rows(tmp_path)["v17_two_stage"][2] == "1"
    # Told once, however often the records are read.
    assert caplog.text.count(str(torn)) == 1
    with pytest.raises(UserError, match="is not the result of a run"):
        read_result(torn / "result.json", ClassifierResult)


def test_one_fingerprint_with_two_outcomes_and_a_misplaced_record_are_left_out(record, tmp_path, caplog):
    record("v17_two_stage", 0, 80)
    for hours, right in ((1, 81), (2, 82)):
        path = record("v17_two_stage", 1, right, hours=hours) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "fedcba98"}), encoding="utf-8")
    shutil.copytree(record("v17_ce_only", 2, 70), tmp_path / "v17_two_stage" / "elsewhere")
    assert _rows(tmp_path)["v17_two_stage"][2] == "1"
    assert caplog.text.count("has the fingerprint fedcba98, of which there is another outcome too") == 2
    assert "calls itself a run of v17_ce_only: put it where it belongs" in caplog.text


def test_no_records_no_table(tmp_path):
    assert write_classifier_table(tmp_path) is None and not list(tmp_path.iterdir())

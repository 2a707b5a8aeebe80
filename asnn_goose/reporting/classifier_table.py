"""``reports/classification.md``: what each arm of the classifiers does on each task, over seeds, from records alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asnn_goose.config import load_classifier_experiment
from asnn_goose.errors import UserError
from asnn_goose.reporting.classifier_record import WATCHED, Score
from asnn_goose.reporting.classifier_runs import (
    ClassifierRun,
    recorded_classifiers,
    seeds_alike,
    without_contradictions,
)
from asnn_goose.reporting.comparison import changed_experiment
from asnn_goose.reporting.effects import ALPHA
from asnn_goose.reporting.markdown import duration, number, percent, table
from asnn_goose.reporting.run_folder import write_text
from asnn_goose.reporting.statistics import Estimate, holm, mean_of

NAME = "classification.md"
Arms = Mapping[str, list[tuple[ClassifierRun, ...]]]
"""Version -> its runs on one task at one scale: groups that differ in their seed alone, the one that counts first."""
REPEATED = ("training", "evaluation")
"""Phases that every run goes through; the first stage and the teacher's fine-tuning are run once for all."""


class Difference(NamedTuple):
    """An arm against its parent, in accuracy, seed by seed."""

    parents: float
    """Mean accuracy of the parent's runs in the pairs."""
    accuracy: Estimate
    """Of the differences."""


def write_classifier_table(reports_root: Path) -> Path | None:
    """Write the table of every task and scale that has records; None where there are none."""
    places: dict[tuple[str, str], dict[str, list[ClassifierRun]]] = {}
    for run in without_contradictions(recorded_classifiers(reports_root)):
        arms = places.setdefault((run.result.scale, run.result.task.name), {})
        arms.setdefault(run.result.version, []).append(run)
    if not places:
        return None
    lines = ["# Classifiers", "", *_explanation()]
    for (scale, task), found in sorted(places.items()):
        lines += ["", *_section(scale, task, {version: seeds_alike(runs) for version, runs in found.items()})]
    path = reports_root / NAME
    write_text(path, "\n".join(lines) + "\n")
    return path


def _explanation() -> list[str]:
    return [
        "Test accuracy is read once, at the end of each run; means over seeds with Student's t-interval (95 %), of one "
        "seed the run's own by bootstrap over texts. An arm differs from its parent in the one change that its reports "
        "name; the difference is taken seed by seed, in points of accuracy, from runs of the parent that differ in "
        "this change alone and learnt from the same fine-tuning of the teacher. Their mean stands beside the parent's "
        "name; it is not that of the parent's own row where that has other seeds or another teacher. A verdict needs "
        f"a p-value below {ALPHA} after Holm's correction over the comparisons of the task. The time is a run's mean "
        "without what all runs share: the teacher's fine-tuning and the first stage. Energy is that of the blocks, "
        f"without the teacher's norms and activations; spikes are those of the first {WATCHED} test texts.",
    ]


def _section(scale: str, task: str, arms: Arms) -> list[str]:
    ordered = sorted(arms, key=lambda version: (arms[version][0][0].result.parent is not None, version))
    differences = {version: found for version in ordered if (found := difference(arms, version)) is not None}
    tested = {version: d.accuracy.p_value for version, d in differences.items() if d.accuracy.p_value is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    rows = [_row(version, arms, differences.get(version), corrected.get(version)) for version in ordered]
    header = [
        "arm", "change", "seeds", "test accuracy (95 %)", "macro-F1", "of the teacher's", "against", "points (95 %)",
        "p, corrected", "verdict", "spike rate", "energy, times the teacher's", "training and evaluation",
    ]  # fmt: skip
    return [
        f"## {task}, scale {scale}",
        "",
        _teachers(arms, ordered),
        "",
        *table(header, rows),
    ]


def _teachers(arms: Arms, ordered: Sequence[str]) -> str:
    """Accuracy of the fine-tuned teacher, and which runs had another one."""
    taught: dict[tuple[str, Score], dict[str, list[int]]] = {}
    for version in ordered:
        for run in arms[version][0]:
            teacher = run.result.teacher
            taught.setdefault((teacher.name, teacher.test), {}).setdefault(version, []).append(run.result.seed)
    (first, _), *others = sorted(taught.items(), key=lambda found: -sum(map(len, found[1].values())))
    words = f"The fine-tuned teacher {first[0]} reaches {_with_interval(first[1])}"
    for (name, score), versions in others:
        runs = ", ".join(f"{version} (seed {', '.join(map(str, seeds))})" for version, seeds in versions.items())
        words += f"; another fine-tuning of {name}, the one of {runs}, {_with_interval(score)}"
    return f"{words}."


def _with_interval(score: Score) -> str:
    return f"{percent(score.accuracy)} ({percent(score.accuracy_low)} to {percent(score.accuracy_high)})"


def difference(arms: Arms, version: str) -> Difference | None:
    """Accuracy of an arm minus its parent's, over the seeds that both have; None without a pair.

    Of the parent's groups the first counts that had the arm's teacher, and whose settings differ from the arm's in
    nothing but the arm's own change.
    """
    runs = arms[version][0]
    for parents in arms.get(runs[0].result.parent or "", []):
        if parents[0].result.teacher != runs[0].result.teacher or not _one_change(parents[0], runs[0]):
            continue
        theirs = {run.result.seed: run.result.student.test.accuracy for run in parents}
        ours = {run.result.seed: run.result.student.test.accuracy for run in runs}
        both = sorted(theirs.keys() & ours.keys())
        if both:
            before, after = (np.array([found[seed] for seed in both]) for found in (theirs, ours))
            return Difference(float(before.mean()), mean_of(after - before))
    return None


def _one_change(parent: ClassifierRun, child: ClassifierRun) -> bool:
    """Whether two runs differ in no other settings than their versions do as they are configured."""
    scale = [f"--scale={child.result.scale}"]
    try:
        before, after = (load_classifier_experiment(run.result.version, scale).experiment for run in (parent, child))
    except UserError:
        return False
    return changed_experiment(parent.experiment, child.experiment).keys() <= changed_experiment(before, after).keys()


def _row(version: str, arms: Arms, found: Difference | None, p_value: float | None) -> list[str]:
    runs = arms[version][0]
    results = [run.result for run in runs]
    accuracy = mean_of(np.array([result.student.test.accuracy for result in results]))
    low, high = accuracy.low, accuracy.high
    if low is not None and high is not None:
        # Student's t knows nothing of the end of the scale.
        low, high = max(low, 0.0), min(high, 1.0)
    else:
        low, high = results[0].student.test.accuracy_low, results[0].student.test.accuracy_high
    spikes = [result.spikes.rate for result in results if result.spikes is not None]
    ratios = [result.ratio_to_teacher for result in results if result.ratio_to_teacher is not None]
    joules = [result.energy for result in results if result.energy is not None]
    return [
        f"[{version}]({version}/README.md)",
        runs[0].experiment.change,
        str(len(runs)),
        f"{percent(accuracy.value)} ({percent(low)} to {percent(high)})",
        percent(_mean([result.student.test.macro_f1 for result in results])),
        percent(_mean(ratios)) if ratios else "",
        (results[0].parent or "") if found is None else f"{results[0].parent} ({percent(found.parents)})",
        "" if found is None else _points(found.accuracy),
        "" if p_value is None else number(p_value, 2),
        _verdict(results[0].parent, arms, found, p_value),
        percent(_mean(spikes)) if spikes else "",
        number(_mean([e.student_joules / e.teacher_joules for e in joules]), 3) if joules else "",
        duration(_mean([sum(result.seconds_by_phase.get(name, 0.0) for name in REPEATED) for result in results])),
    ]


def _points(accuracy: Estimate) -> str:
    def points(share: float) -> str:
        # Adding 0 turns a rounded -0 into 0.
        return f"{round(100 * share, 1) + 0.0:+.1f}"

    if accuracy.low is None or accuracy.high is None:
        return points(accuracy.value)
    return f"{points(accuracy.value)} ({points(accuracy.low)} to {points(accuracy.high)})"


def _verdict(parent: str | None, arms: Arms, found: Difference | None, p_value: float | None) -> str:
    if parent is None:
        return "base"
    if found is None:
        return "not comparable" if parent in arms else "parent without runs"
    if p_value is None:
        return "one seed"
    if p_value >= ALPHA:
        return "no difference shown"
    return "helps" if found.accuracy.value > 0 else "hurts"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

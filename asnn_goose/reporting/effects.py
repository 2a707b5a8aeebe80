"""What each version of a ladder does: means over its seeds, its difference from its parent, and a verdict."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from asnn_goose.reporting.comparison import FinishedRun, changed_settings
from asnn_goose.reporting.ladder import Ladder, Rung
from asnn_goose.reporting.seeds import Delta, SeedGroup, by_seed, mean_perplexity, paired, unpaired
from asnn_goose.reporting.statistics import holm

Verdict = Literal[
    "helps",
    "hurts",
    "no difference shown",
    "one seed",
    "not comparable",
    "base",
    "parent without runs",
    "left out",
    "not run",
]
ALPHA = 0.05
"""Corrected p-value below which a difference counts as shown."""


@dataclass(frozen=True)
class Summary:
    """Means over the seeds of one group: geometric of perplexities and their ratios, arithmetic of the rest.

    None where a run did not measure it.
    """

    n: int
    """Seeds."""
    test_ppl: float
    """Test perplexity."""
    low: float | None
    """Lower end of its 95 % interval: Student's t over seeds, of a single run its own bootstrap, else None."""
    high: float | None
    ratio_to_teacher: float
    """Test perplexity over the teacher's."""
    kl: float
    """KL(teacher || student) in nats per token."""
    top1: float
    """Share of test tokens where both rank the same token first."""
    spike_rate: float | None
    """Share of (token, channel, micro-step) that spike; None too of a student whose neurons do not spike."""
    spike_operands: float | None
    """Share of the mixer matrices' multiply-accumulates whose operand is a spike; None as above."""
    zero_operands: float | None
    """Share of (token, channel) whose operand, the mean spike or the level, is zero."""
    joules: float | None
    """Estimated arithmetic of the student in joules per token; levels that are not spikes are multiplied."""
    energy_ratio: float | None
    """The same over the teacher's."""
    tokens_per_second: float
    """Training throughput."""
    seconds: float
    """Wall time of a run in seconds, evaluation included."""


@dataclass(frozen=True)
class Effect:
    """A version, what its runs measured, and what its change did."""

    rung: Rung
    summary: Summary | None
    """None without runs."""
    delta: Delta | None
    """Against the parent, None where there is nothing to compare with."""
    p_holm: float | None
    """The delta's p-value, corrected for all comparisons of the ladder."""
    verdict: Verdict


def effects(ladder: Ladder) -> list[Effect]:
    """One for each version, in the ladder's order.

    Runs that share a seed read the same data in the same order and, where they share the arithmetic too, are paired. A
    version with fewer than two pairs is compared by Welch's test, where that has an interval.
    """
    groups = {rung.version: rung.runs for rung in ladder.rungs}
    deltas = [_delta(rung.runs, groups.get(rung.parent or "", ())) for rung in ladder.rungs]
    tested = [delta.p_value for delta in deltas if delta is not None and delta.p_value is not None]
    corrected = iter(holm(tested))
    found = []
    for rung, delta in zip(ladder.rungs, deltas, strict=True):
        p_holm = next(corrected) if delta is not None and delta.p_value is not None else None
        parent_runs = groups.get(rung.parent or "", ())
        summary = summarise(rung.runs) if rung.runs else None
        found.append(Effect(rung, summary, delta, p_holm, _verdict(rung, parent_runs, delta, p_holm)))
    return found


def summarise(runs: SeedGroup) -> Summary:
    """Means over the seeds of one group, of at least one run."""
    mean = mean_perplexity(runs)
    # One run has no interval over seeds; its own stands for it.
    only = runs[0].result.student if len(runs) == 1 else None

    def average(value: Callable[[FinishedRun], float]) -> float:
        return float(by_seed(runs, value).mean())

    def measured(value: Callable[[FinishedRun], float | None]) -> float | None:
        return None if any(value(run) is None for run in runs) else average(lambda run: value(run) or 0.0)

    return Summary(
        n=mean.n,
        test_ppl=mean.value,
        low=mean.low if only is None else only.test_ppl_low,
        high=mean.high if only is None else only.test_ppl_high,
        ratio_to_teacher=math.exp(
            average(lambda run: math.log(run.result.student.test_ppl / run.result.teacher.test_ppl))
        ),
        kl=average(lambda run: run.result.kl_to_teacher),
        top1=average(lambda run: run.result.top1_agreement),
        spike_rate=measured(lambda run: run.result.spikes.rate if run.result.spikes and run.spikes else None),
        spike_operands=measured(
            lambda run: run.result.spikes.operand_fraction if run.result.spikes and run.spikes else None
        ),
        zero_operands=measured(lambda run: run.result.spikes.zero_fraction if run.result.spikes else None),
        joules=measured(lambda run: run.student_joules),
        energy_ratio=measured(_energy_ratio),
        tokens_per_second=average(lambda run: run.result.tokens_per_second),
        seconds=average(lambda run: run.result.wall_seconds),
    )


def _energy_ratio(run: FinishedRun) -> float | None:
    joules, energy = run.student_joules, run.result.energy
    return None if joules is None or energy is None else joules / energy.teacher_joules_per_token


def changes_nothing(runs: SeedGroup, parent_runs: SeedGroup) -> bool:
    """Whether a version repeats its parent's settings, so that its ratio, always unpaired, is what noise makes."""
    return not changed_settings(parent_runs[0], runs[0], arithmetic=False)


def _delta(runs: SeedGroup, parent_runs: SeedGroup) -> Delta | None:
    if not runs or not parent_runs:
        return None
    means = unpaired(runs, parent_runs)
    # A pair of these is one computation done twice, which tells nothing of noise.
    if changes_nothing(runs, parent_runs):
        return means
    pairs = paired(runs, parent_runs)
    if pairs is None or (pairs.n == 1 and means is not None and means.low is not None):
        return means
    return pairs


def _verdict(rung: Rung, parent_runs: SeedGroup, delta: Delta | None, p_holm: float | None) -> Verdict:
    if not rung.runs:
        return "left out" if rung.left_out else "not run"
    if rung.parent is None:
        return "base"
    if delta is None:
        return "not comparable" if parent_runs else "parent without runs"
    if p_holm is None:
        return "one seed"
    if p_holm >= ALPHA:
        return "no difference shown"
    return "helps" if delta.ratio < 1 else "hurts"

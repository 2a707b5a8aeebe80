"""What each version of a ladder does: means over its seeds, its difference from its parent, and a verdict."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from asnn_goose.reporting.ladder import Ladder, Rung
from asnn_goose.reporting.seeds import Delta, SeedGroup, mean_perplexity, paired, unpaired
from asnn_goose.reporting.statistics import holm

T = TypeVar("T")
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
    """Means over the runs of one group: geometric of perplexities and their ratios, arithmetic of the rest.

    None where a run did not measure it.
    """

    n: int
    """Seeds."""
    test_ppl: float
    """Test perplexity."""
    low: float | None
    """Lower end of its 95 % interval: Student's t over seeds, with one seed the run's own bootstrap over windows."""
    high: float | None
    ratio_to_teacher: float
    """Test perplexity over the teacher's."""
    kl: float
    """KL(teacher || student) in nats per token."""
    top1: float
    """Share of test tokens where both rank the same token first."""
    spike_rate: float | None
    """Share of (token, channel, micro-step) that spike."""
    spike_operands: float | None
    """Share of the mixer matrices' multiply-accumulates whose operand is a spike."""
    zero_operands: float | None
    """Share of (token, channel) whose mean spike is zero."""
    joules: float | None
    """Estimated arithmetic of the student in joules per token."""
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

    Runs that share a seed read the same data in the same order and are paired; a version that has no seed in common
    with its parent is compared by Welch's test.
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
    """Means over the runs of one group, at least one."""
    mean = mean_perplexity(runs)
    only = runs[0].result.student if mean.n == 1 else None

    results = [run.result for run in runs]
    spikes, energies = [result.spikes for result in results], [result.energy for result in results]
    return Summary(
        n=mean.n,
        test_ppl=mean.value,
        low=mean.low if only is None else only.test_ppl_low,
        high=mean.high if only is None else only.test_ppl_high,
        ratio_to_teacher=float(np.exp(np.mean(np.log([result.ratio_to_teacher for result in results])))),
        kl=_mean(result.kl_to_teacher for result in results),
        top1=_mean(result.top1_agreement for result in results),
        spike_rate=_measured(spikes, lambda spike: spike.rate),
        spike_operands=_measured(spikes, lambda spike: spike.operand_fraction),
        zero_operands=_measured(spikes, lambda spike: spike.zero_fraction),
        joules=_measured(energies, lambda energy: energy.student_joules_per_token),
        energy_ratio=_measured(
            energies, lambda energy: energy.student_joules_per_token / energy.teacher_joules_per_token
        ),
        tokens_per_second=_mean(result.tokens_per_second for result in results),
        seconds=_mean(result.wall_seconds for result in results),
    )


def _delta(runs: SeedGroup, parent_runs: SeedGroup) -> Delta | None:
    if not runs or not parent_runs:
        return None
    compare = paired if {run.result.seed for run in runs} & {run.result.seed for run in parent_runs} else unpaired
    return compare(runs, parent_runs)


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


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _measured(parts: Sequence[T | None], value: Callable[[T], float]) -> float | None:
    """Mean of a value over a part of every result, None where a run lacks it."""
    present = [part for part in parts if part is not None]
    return _mean(map(value, present)) if len(present) == len(parts) else None

"""A version's runs over several seeds: their mean, and paired comparisons with the versions it descends from.

Statistics are of log test perplexity, so that a difference, once exponentiated, is a ratio. Intervals are Student's t
over seeds, which takes the logarithms for normal: they cover what a seed decides (initialisation, order of the data)
and not the choice of the test text.

A seed may have been run in bfloat16 and in float32, as machines differ. Rounding is noise too: such runs are compared
with partners of their own arithmetic alone, and a seed that has both counts once, as the mean of the two.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from asnn_goose.reporting.comparison import FinishedRun, changed_settings, finished_runs, verdict
from asnn_goose.reporting.markdown import number
from asnn_goose.reporting.statistics import one_sample, welch

SeedVerdict = Literal["helps", "hurts", "no difference shown", "one pair only"]
SeedGroup = tuple[FinishedRun, ...]
"""Runs of one scale that differ in seed and arithmetic alone, one of each of both, by rising seed."""


@dataclass(frozen=True)
class MeanPerplexity:
    """exp of the mean over seeds of log test perplexity."""

    n: int
    """Seeds."""
    value: float
    low: float | None
    """Lower end of the 95 % t-interval, None with one seed."""
    high: float | None


@dataclass(frozen=True)
class Delta:
    """exp of the mean over seeds of log(test perplexity of a version / that of another)."""

    n: int
    """Seeds that both were run with in one arithmetic; unpaired: seeds of the version that has fewer."""
    ratio: float
    """Below 1 the version has the lower perplexity."""
    low: float | None
    """Lower end of the 95 % t-interval, None where n is 1."""
    high: float | None
    p_value: float | None
    """Two-sided t-test of a ratio of 1, None where n is 1."""
    paired: bool = True
    """Whether runs of one seed were compared with each other, or the means of all."""

    @property
    def verdict(self) -> SeedVerdict:
        if self.low is None or self.high is None:
            return "one pair only"
        return "helps" if self.high < 1 else "hurts" if self.low > 1 else "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """A group of a version's runs against the nearest group of another version."""

    version: str
    """The other version."""
    differing: tuple[str, ...]
    """Dotted keys of the settings that can change a number and differ."""
    delta: Delta


def seed_groups(runs: Iterable[FinishedRun]) -> list[SeedGroup]:
    """Runs that may be averaged: of one scale, on as many test tokens, and no setting that can change a number differs,
    but for the arithmetic.

    Of a seed's runs in one arithmetic the newest counts. Groups come by scale, then by their newest run, newest first.
    """
    groups: list[list[FinishedRun]] = []
    for run in sorted(runs, key=lambda run: run.result.age, reverse=True):
        home = next((group for group in groups if _alike(group[0], run)), None)
        if home is None:
            groups.append([run])
        elif pair_key(run) not in map(pair_key, home):
            home.append(run)
    # Sorting is stable, and the groups stand in the order of their newest run.
    groups.sort(key=lambda group: group[0].result.scale)
    return [tuple(sorted(group, key=pair_key)) for group in groups]


def pair_key(run: FinishedRun) -> tuple[int, str]:
    """What a run and its partner of another version have in common."""
    return run.result.seed, run.arithmetic


def by_seed(runs: SeedGroup, value: Callable[[FinishedRun], float | np.ndarray]) -> np.ndarray:
    """Mean of a value [...] over the runs of each seed, by rising seed [seeds, ...]."""
    same = itertools.groupby(runs, lambda run: run.result.seed)
    return np.array([np.array([value(run) for run in of_seed]).mean(axis=0) for _, of_seed in same])


def mean_perplexity(runs: Iterable[FinishedRun]) -> MeanPerplexity:
    """Mean over the seeds of one group, exp(mean log perplexity +- t_0.975(n - 1) s / sqrt(n)).

    Raises:
        ValueError: no runs, or runs that differ in more than their seed.
    """
    group = _only_group(runs)
    if not group:
        raise ValueError("mean_perplexity needs at least one run")
    logs = by_seed(group, _log)
    value, low, high, _ = one_sample(logs)
    return MeanPerplexity(len(logs), value, low, high)


def paired(version_runs: Iterable[FinishedRun], other_runs: Iterable[FinishedRun]) -> Delta | None:
    """Compare a version with another seed by seed, None where no pair is left.

    d_s = log perplexity of the version - log perplexity of the other, at seed s and in one arithmetic; interval of mean
    d +- t_0.975(n - 1) s_d / sqrt(n); p of t = mean d / (s_d / sqrt(n)). Pairs that were evaluated on different text
    are left out.

    Args:
        version_runs: one scale, differing in their seed alone; :func:`seed_groups` sorts them so.
        other_runs: the same of the other version.

    Raises:
        ValueError: runs of one version differ in more than their seed, or the two versions in their scale.
    """
    pairs = pairs_of(version_runs, other_runs)
    if not pairs:
        return None
    versions, others = zip(*pairs, strict=True)
    differences = by_seed(versions, _log) - by_seed(others, _log)
    return Delta(len(differences), *one_sample(differences))


def pairs_of(
    version_runs: Iterable[FinishedRun], other_runs: Iterable[FinishedRun]
) -> list[tuple[FinishedRun, FinishedRun]]:
    """What :func:`paired` compares: runs of one seed, in one arithmetic and on one text."""
    mine, theirs = _of_one_scale(version_runs, other_runs)
    partners = {pair_key(run): run for run in theirs}
    pairs = [(run, partners[pair_key(run)]) for run in mine if pair_key(run) in partners]
    return [pair for pair in pairs if verdict(*pair) != "not comparable"]


def unpaired(version_runs: Iterable[FinishedRun], other_runs: Iterable[FinishedRun]) -> Delta | None:
    """Compare the means of two versions, whatever their seeds (:func:`~asnn_goose.reporting.statistics.welch`).

    Only runs in one arithmetic count, since two mixed in unlike shares would differ by that alone: the one in which
    the version that has fewer seeds has most. None where the two have none in common, and where they were evaluated on
    different text. Arguments and errors are those of :func:`paired`.
    """
    mine, theirs = _of_one_scale(version_runs, other_runs)
    ours, others = (Counter(run.arithmetic for run in runs) for runs in (mine, theirs))
    common = ours & others  # the smaller of two counts
    if not common:
        return None
    most = max(sorted(common), key=common.__getitem__)
    mine, theirs = (tuple(run for run in runs if run.arithmetic == most) for runs in (mine, theirs))
    if verdict(mine[0], theirs[0]) == "not comparable":
        return None
    logs, other_logs = by_seed(mine, _log), by_seed(theirs, _log)
    return Delta(min(len(logs), len(other_logs)), *welch(logs, other_logs), paired=False)


def nearest_group(group: SeedGroup, candidates: Iterable[SeedGroup]) -> SeedGroup | None:
    """The candidate of the same scale with the fewest differing settings, then most common seeds, then the first."""

    def distance(other: SeedGroup) -> tuple[int, int]:
        common = set(map(pair_key, group)) & set(map(pair_key, other))
        return len(changed_settings(other[0], group[0], arithmetic=False)), -len(common)

    return min((other for other in candidates if scale_of(other) == scale_of(group)), key=distance, default=None)


def ancestors(parent: str | None, runs_root: Path, reports_root: Path) -> dict[str, list[FinishedRun]]:
    """Finished runs of the parent, of its parent, and so on, nearest first.

    A version's parent is the one that its newest run names, so the chain ends at a version without finished runs.
    """
    found: dict[str, list[FinishedRun]] = {}
    while parent is not None and parent not in found:
        runs = finished_runs(parent, runs_root, reports_root)
        if not runs:
            break
        found[parent] = runs
        parent = runs[0].result.parent
    return found


def group_of(run: FinishedRun, version_runs: Iterable[FinishedRun]) -> SeedGroup:
    """The group that `run` belongs to, formed of it and the finished runs of its version."""
    return next(group for group in seed_groups([run, *version_runs]) if _alike(group[0], run))


def compare(group: SeedGroup, lineage: Mapping[str, list[FinishedRun]]) -> list[Comparison]:
    """Pair a group with the nearest group of each ancestor; those without a common seed are left out.

    Args:
        group: runs of one version.
        lineage: finished runs of its ancestors, as :func:`ancestors` gives them.
    """
    found = []
    for name, runs in lineage.items():
        other = nearest_group(group, seed_groups(runs))
        delta = None if other is None else paired(group, other)
        if other is not None and delta is not None:
            differing = changed_settings(other[0], group[0], arithmetic=False)
            found.append(Comparison(name, tuple(differing), delta))
    return found


def scale_of(group: SeedGroup) -> str:
    return group[0].result.scale


def interval_words(low: float | None, high: float | None) -> str:
    """An interval as text, nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"{number(low)} to {number(high)}" if math.isfinite(high) else f"{number(low)} and above"


def _alike(one: FinishedRun, other: FinishedRun) -> bool:
    scale, tokens = other.result.scale, other.result.evaluation.test_tokens
    same = one.result.scale == scale and one.result.evaluation.test_tokens == tokens
    return same and not changed_settings(one, other, arithmetic=False)


def _only_group(runs: Iterable[FinishedRun]) -> SeedGroup:
    groups = seed_groups(runs)
    if len(groups) > 1:
        raise ValueError(f"the runs are of {len(groups)} settings or scales, not of one: split them by seed_groups")
    return groups[0] if groups else ()


def _of_one_scale(
    version_runs: Iterable[FinishedRun], other_runs: Iterable[FinishedRun]
) -> tuple[SeedGroup, SeedGroup]:
    mine, theirs = _only_group(version_runs), _only_group(other_runs)
    scales = {run.result.scale for run in (*mine, *theirs)}
    if len(scales) > 1:
        raise ValueError(f"runs to compare must be of one scale, not {' and '.join(sorted(scales))}")
    return mine, theirs


def _log(run: FinishedRun) -> float:
    return math.log(run.result.student.test_ppl)

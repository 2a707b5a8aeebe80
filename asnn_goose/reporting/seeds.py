"""A version's runs over several seeds: their mean, and paired comparisons with the versions it descends from.

Statistics are of log test perplexity, so that a difference, once exponentiated, is a ratio. Intervals are Student's t
over seeds, which takes the logarithms for normal: they cover what a seed decides (initialisation, order of the data)
and not the choice of the test text.
"""

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asnn_goose.reporting.comparison import FinishedRun, changed_settings, finished_runs, verdict
from asnn_goose.reporting.markdown import integer, number, table
from asnn_goose.reporting.statistics import one_sample, welch

SeedVerdict = Literal["helps", "hurts", "no difference shown", "one pair only"]
SeedGroup = tuple[FinishedRun, ...]
"""Runs of one scale that differ in their seed alone, one of each seed, by rising seed."""
MOST_VALUES = 4
"""Settings whose values stand in a row of the list."""


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
    """Seeds that both were run with; unpaired: runs of the version that has fewer."""
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
    """Runs that may be averaged: of one scale, on as many test tokens, and no setting that can change a number differs.

    Of a seed's runs the newest counts. Groups come by scale, then those with more seeds first, then the newer.
    """
    groups: list[list[FinishedRun]] = []
    for run in sorted(runs, key=_age, reverse=True):
        home = next((group for group in groups if _alike(group[0], run)), None)
        if home is None:
            groups.append([run])
        elif run.result.seed not in {other.result.seed for other in home}:
            home.append(run)
    # Sorting is stable, and the groups stand in the order of their newest run.
    groups.sort(key=lambda group: (group[0].result.scale, -len(group)))
    return [tuple(sorted(group, key=lambda run: run.result.seed)) for group in groups]


def mean_perplexity(runs: Iterable[FinishedRun]) -> MeanPerplexity:
    """Mean over the seeds of one group, exp(mean log perplexity +- t_0.975(n - 1) s / sqrt(n)).

    Raises:
        ValueError: no runs, or runs that differ in more than their seed.
    """
    group = _only_group(runs)
    if not group:
        raise ValueError("mean_perplexity needs at least one run")
    value, low, high, _ = one_sample(_logs(group))
    return MeanPerplexity(len(group), value, low, high)


def paired(version_runs: Iterable[FinishedRun], other_runs: Iterable[FinishedRun]) -> Delta | None:
    """Compare a version with another seed by seed, None where no pair is left.

    d_s = log perplexity of the version - log perplexity of the other, at seed s; interval of mean d +- t_0.975(n - 1)
    s_d / sqrt(n); p of t = mean d / (s_d / sqrt(n)). Pairs evaluated on different text are left out.

    Args:
        version_runs: one scale, differing in their seed alone; :func:`seed_groups` sorts them so.
        other_runs: the same of the other version.

    Raises:
        ValueError: runs of one version differ in more than their seed, or the two versions in their scale.
    """
    mine, theirs = _of_one_scale(version_runs, other_runs)
    by_seed = {run.result.seed: run for run in theirs}
    pairs = [(run, by_seed[run.result.seed]) for run in mine if run.result.seed in by_seed]
    pairs = [pair for pair in pairs if verdict(*pair) != "not comparable"]
    if not pairs:
        return None
    versions, others = zip(*pairs, strict=True)
    return Delta(len(pairs), *one_sample(_logs(versions) - _logs(others)))


def unpaired(version_runs: Iterable[FinishedRun], other_runs: Iterable[FinishedRun]) -> Delta | None:
    """Compare the means of two versions that have no seed in common (:func:`~asnn_goose.reporting.statistics.welch`).

    None where they were evaluated on different text. Arguments and errors are those of :func:`paired`.
    """
    mine, theirs = _of_one_scale(version_runs, other_runs)
    if not mine or not theirs or verdict(mine[0], theirs[0]) == "not comparable":
        return None
    return Delta(min(len(mine), len(theirs)), *welch(_logs(mine), _logs(theirs)), paired=False)


def nearest_group(group: SeedGroup, candidates: Iterable[SeedGroup]) -> SeedGroup | None:
    """The candidate of the same scale with the fewest differing settings, then most common seeds, then the first."""

    def distance(other: SeedGroup) -> tuple[int, int]:
        common = {run.result.seed for run in group} & {run.result.seed for run in other}
        return len(changed_settings(other[0], group[0])), -len(common)

    return min((other for other in candidates if _scale(other) == _scale(group)), key=distance, default=None)


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
            found.append(Comparison(name, tuple(changed_settings(other[0], group[0])), delta))
    return found


def section(runs: Iterable[FinishedRun], lineage: Mapping[str, list[FinishedRun]]) -> list[str]:
    """Lines for the list of a version's reports: means over seeds by scale, and each ancestor's comparison.

    Args:
        runs: finished runs of the version.
        lineage: finished runs of its ancestors, as :func:`ancestors` gives them.
    """
    groups = seed_groups(runs)
    labels = [label for _, same in itertools.groupby(groups, _scale) for label in _labels(list(same))]
    means, deltas = [], []
    for group, label in zip(groups, labels, strict=True):
        mean, tokens = mean_perplexity(group), integer(group[0].result.evaluation.test_tokens)
        interval = interval_words(mean.low, mean.high)
        means.append([_scale(group), label, tokens, str(mean.n), number(mean.value), interval])
        for against in compare(group, lineage):
            delta, changed = against.delta, ", ".join(branches(against.differing)) or "no settings"
            cells = [str(delta.n), number(delta.ratio), interval_words(delta.low, delta.high), delta.verdict, changed]
            deltas.append([_scale(group), label, against.version, *cells])
    header = ["scale", "settings", "test tokens", "seeds", "test perplexity", "95 % interval"]
    lines = ["## Over seeds", "", *table(header, means), ""]
    text = ["Perplexities are geometric means over seeds; runs of other settings are not pooled."]
    if any(labels):
        text.append("Settings are told where they differ from those of the scale's first row.")
    if deltas:
        header = ["scale", "settings", "against", "paired seeds", "ratio", "95 % interval", "verdict", "differs in"]
        lines += [*table(header, deltas), ""]
        text.append(
            "A ratio is this version's perplexity over the other's, seed by seed: below 1 this version is better. A "
            "verdict is on all the settings in which the two differ, and names a direction where the interval leaves "
            "out 1."
        )
    if any(len(group) > 1 for group in groups):
        text.append(
            "Intervals over seeds are Student's t. They cover the spread that initialisation and data order make on "
            "one text; what another text would change is in the intervals of single runs, not in these."
        )
    return [*lines, " ".join(text)]


def interval_words(low: float | None, high: float | None) -> str:
    """An interval as text, nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"{number(low)} to {number(high)}" if math.isfinite(high) else f"{number(low)} and above"


def branches(keys: Collection[str]) -> list[str]:
    """Dotted keys as code; several of one branch, such as distillation.curriculum, as that branch and a star."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(".".join(key.split(".")[:2]), []).append(key)
    return [f"`{below[0]}`" if len(below) == 1 else f"`{branch}.*`" for branch, below in found.items()]


def _age(run: FinishedRun) -> tuple[Any, str]:
    return run.result.started, run.result.run_id


def _scale(group: SeedGroup) -> str:
    return group[0].result.scale


def _alike(one: FinishedRun, other: FinishedRun) -> bool:
    scale, tokens = other.result.scale, other.result.evaluation.test_tokens
    same = one.result.scale == scale and one.result.evaluation.test_tokens == tokens
    return same and not changed_settings(one, other)


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


def _logs(runs: Iterable[FinishedRun]) -> np.ndarray:
    return np.log([run.result.student.test_ppl for run in runs])


def _labels(groups: Sequence[SeedGroup]) -> list[str]:
    """What tells groups of one scale apart: the settings in which each differs from the first, few of them with values.

    Many go by branch, unless that reads the same for two groups.
    """
    differing = [changed_settings(groups[0][0], group[0]) for group in groups]
    values = [
        ", ".join(f"`{key}: {json.dumps(value)}`" for key, (_, value) in sorted(changes.items()))
        for changes in differing
    ]
    short = [", ".join(branches(sorted(changes))) for changes in differing]
    return [
        brief if len(changes) > MOST_VALUES and short.count(brief) == 1 else full
        for changes, brief, full in zip(differing, short, values, strict=True)
    ]

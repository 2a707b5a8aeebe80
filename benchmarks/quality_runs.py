"""Which committed runs a bar of quality is judged on: rules over result.json and the config.yaml beside it."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asnn_goose.config.schema import DataConfig, TeacherConfig, TrainConfig
from asnn_goose.reporting.classifier_runs import is_classifier_run
from asnn_goose.reporting.comparison import NEURON, FinishedRun, changed_settings, load_run
from asnn_goose.reporting.seeds import SeedGroup, by_seed, pair_key, seed_groups
from asnn_goose.reporting.statistics import Estimate, one_sample

TOKENS_154K = (153_600, 154_112)
"""Whole steps of 512 tokens next to 154,000."""
TOKENS_CPU = 98_304
"""Training tokens of the cpu scale, at most: what it had before it had 81,920."""
SHORTEST_HOUR, LONGEST_HOUR = 2_400, 3_700
"""Seconds, from above the first to the second."""
LONGEST_CPU = 720
"""Seconds that the cpu scale may take."""
MOST_STEPS = 4
"""T, micro-steps per token."""
EQUAL_WALL = 1.1
"""Wall times are equal if the longer is at most this many times the shorter."""
STEP_VERSIONS = ("v10_steps_1", "v10_steps_2", "v10_steps_3", "v10")
"""Versions that differ in T."""
SPARSE_VERSIONS = ("v10", "v10_sparse_40", "v10_sparse_60")
"""Versions that differ in the zero operands that they start with."""


class Pairing(NamedTuple):
    """Two settings with the same seeds, in the same order."""

    runs: SeedGroup
    others: SeedGroup


def committed(reports_root: Path) -> list[FinishedRun]:
    """Every language model's run that has a result.json below ``reports/<version>/<run_id>``, by path.

    Raises:
        UserError: a record is damaged.
    """
    folders = [path.parent for path in sorted(reports_root.glob("*/*/result.json"))]
    return [load_run(folder) for folder in folders if not is_classifier_run(folder)]


def on_reference_text(run: FinishedRun) -> bool:
    """The default teacher on the default text, windows and test tokens: perplexities that may be compared."""
    experiment = run.experiment
    same_test = experiment.train.test_tokens == TrainConfig.model_fields["test_tokens"].default
    return experiment.data == DataConfig() and experiment.teacher.name == TeacherConfig().name and same_test


def after_154_thousand_tokens(run: FinishedRun) -> bool:
    """At the ladder or the cpu scale, with the tokens set to 154 thousand."""
    return run.result.scale in ("ladder", "cpu") and run.result.tokens_seen in TOKENS_154K


def at_the_cpu_scale(run: FinishedRun) -> bool:
    """At the cpu scale with no more tokens than it has by itself; fewer are allowed."""
    return run.result.scale == "cpu" and run.result.tokens_seen <= TOKENS_CPU


def in_an_hour(run: FinishedRun) -> bool:
    """At any scale, by wall time."""
    return SHORTEST_HOUR < run.result.wall_seconds <= LONGEST_HOUR


def at_the_gpu_scale(run: FinishedRun) -> bool:
    return run.result.scale == "gpu"


def within_micro_steps(run: FinishedRun) -> bool:
    """T <= 4 in front of every product."""
    student = run.experiment.student
    return max(student.neuron.steps, student.hidden_neuron.steps) <= MOST_STEPS


def only_neurons_differ(run: FinishedRun, other: FinishedRun) -> bool:
    """Same scale, tokens and student but for the settings of its neurons; the seed is free."""
    same = run.result.scale == other.result.scale and run.result.tokens_seen == other.result.tokens_seen
    return same and all(key.startswith(NEURON) for key in changed_settings(run, other))


def equal_wall(run: FinishedRun, other: FinishedRun) -> bool:
    shorter, longer = sorted((run.result.wall_seconds, other.result.wall_seconds))
    return longer <= EQUAL_WALL * shorter


def groups(runs: Iterable[FinishedRun]) -> list[SeedGroup]:
    """Runs of one version and settings, one of each seed."""
    ordered = sorted(runs, key=lambda run: run.result.version)
    return [
        group for _, same in itertools.groupby(ordered, lambda run: run.result.version) for group in seed_groups(same)
    ]


def times_the_teacher(group: SeedGroup) -> Estimate:
    """Test perplexity over the teacher's, the geometric mean over seeds."""
    return one_sample(by_seed(group, lambda run: math.log(run.result.ratio_to_teacher)))


def best(runs: Iterable[FinishedRun], longest: float = math.inf) -> SeedGroup | None:
    """The group with the lowest mean perplexity, among those whose every run took at most ``longest`` seconds.

    Where no group did, the lowest of all; None without runs.
    """

    def rank(group: SeedGroup) -> tuple[bool, float]:
        return max(run.result.wall_seconds for run in group) > longest, times_the_teacher(group).value

    return min(groups(runs), key=rank, default=None)


def paired(
    runs: Iterable[FinishedRun], others: Iterable[FinishedRun], alike: Callable[[FinishedRun, FinishedRun], bool]
) -> list[Pairing]:
    """Every two groups with common seeds, in one arithmetic, at which the rule ``alike`` holds; these seeds alone."""
    found = []
    for group, other_group in itertools.product(groups(runs), groups(others)):
        partners = {pair_key(other): other for other in other_group}
        pairs = [(run, other) for run in group if (other := partners.get(pair_key(run))) and alike(run, other)]
        if pairs:
            found.append(Pairing(*map(tuple, zip(*pairs, strict=True))))
    return found


def against_twin(runs: Iterable[FinishedRun], twins: Iterable[FinishedRun]) -> Pairing | None:
    """Runs with T <= 4, or none, and twins of which only the neurons differ: the most seeds, then the most tokens."""
    found = paired((run for run in runs if not run.spikes or within_micro_steps(run)), twins, only_neurons_differ)
    return max(found, key=lambda pair: (len(pair.runs), pair.runs[0].result.tokens_seen), default=None)


def conversion(runs: Sequence[FinishedRun]) -> Pairing | None:
    """Spiking students that start from the teacher's layers, and from its embeddings alone, at equal wall time.

    The most seeds, then the lowest perplexity on both sides.
    """

    def starting(init: str) -> list[FinishedRun]:
        return [run for run in runs if run.spikes and run.experiment.student.init == init]

    def rank(pair: Pairing) -> tuple[int, float, float]:
        return -len(pair.runs), times_the_teacher(pair.runs).value, times_the_teacher(pair.others).value

    return min(paired(starting("layers"), starting("embeddings"), equal_wall), key=rank, default=None)


def perplexity_ratio(pairing: Pairing) -> Estimate:
    """Test perplexity of the runs over that of the others, seed by seed."""
    mine, theirs = (by_seed(side, lambda run: math.log(run.result.student.test_ppl)) for side in pairing)
    return one_sample(mine - theirs)


def zero_shares(group: SeedGroup) -> tuple[float, float]:
    """Shares of operands that are 0, over tokens x channels and over micro-steps, the mean over seeds.

    Raises:
        ValueError: a student without spikes.
    """

    def shares(run: FinishedRun) -> np.ndarray:
        if run.result.spikes is None:
            raise ValueError(f"{run.result.version} has runs without spikes, whose operands were not counted")
        return np.array([run.result.spikes.zero_fraction, 1.0 - run.result.spikes.rate])

    over_tokens, over_steps = by_seed(group, shares).mean(axis=0)
    return float(over_tokens), float(over_steps)


def sweep(runs: Iterable[FinishedRun], versions: Sequence[str]) -> list[SeedGroup]:
    """One group of each of the versions, in their order, that differ from each other in their neurons alone.

    Of several such rows the one with most versions, then most runs, then most tokens.
    """
    candidates = groups(run for run in runs if run.spikes and run.result.version in versions)
    rows = []
    for anchor in candidates:
        row = {anchor[0].result.version: anchor}
        for group in candidates:
            if only_neurons_differ(anchor[0], group[0]):
                row.setdefault(group[0].result.version, group)
        rows.append([row[version] for version in versions if version in row])
    return max(rows, key=lambda row: (len(row), sum(map(len, row)), row[0][0].result.tokens_seen), default=[])

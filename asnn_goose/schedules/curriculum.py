"""A curriculum of baby steps: subsets that grow from the easiest examples to all, and when to go on to the next."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from asnn_goose.schedules.stopping import check_finite, check_patience


@dataclass(frozen=True)
class Stage:
    """What holds in one stage."""

    volume: float
    """Share of the examples, easiest first, above 0 and at most 1."""
    temperature: float | None = None
    """T of the distillation; None: as without a curriculum."""
    w_kd: float | None = None
    """Weight of the distillation term; None: as without a curriculum."""


POCL_STAGES = (Stage(0.25, 1.0, 0.7), Stage(0.5, 1.33, 0.8), Stage(0.75, 1.67, 0.9), Stage(1.0, 2.0, 1.0))
"""Settings of POCL's code (arXiv 2506.05695), for w_ce = 1 - w_kd: the weight of the distillation rises."""


def stage_sizes(n: int, volumes: Sequence[float]) -> list[int]:
    """Examples of each stage, cumulative: stage i adds floor(n (volume_i - volume_{i-1})), the last takes the rest.

    For S equal steps these are the floor(n / S) (i + 1) of POCL's code, with n at the end: n = 10 and S = 4 give 2, 4,
    6, 10, where floor(n volume_i) would give 2, 5, 7, 10. Volumes are read as the nearest fractions with denominators
    up to 10^6, so that 0.3 - 0.2 is a tenth, and a third is a third.

    Raises:
        ValueError: volumes are none, do not rise strictly from above 0, or do not end at 1; or n is so small that the
            first stage would be empty.
    """
    increments = _increments(volumes)
    sizes: list[int] = []
    for increment in increments[:-1]:
        sizes.append((sizes[-1] if sizes else 0) + math.floor(n * increment))
    sizes.append(n)
    if sizes[0] < 1:
        raise ValueError(f"the first stage holds {volumes[0]} of {n} examples, less than one: raise its volume")
    return sizes


def stage_at(progress: float, boundaries: Sequence[float]) -> int:
    """0-based stage at a share of the run: the number of boundaries b with progress >= b.

    Raises:
        ValueError: progress is NaN, or boundaries are not strictly rising within (0, 1).
    """
    if math.isnan(progress):
        raise ValueError("progress must be a share of the run, not nan")
    _check_boundaries(boundaries)
    return sum(progress >= boundary for boundary in boundaries)


def stage_order(subset: Sequence[int] | np.ndarray, size: int, seed: int, stage: int, epoch: int) -> np.ndarray:
    """The first ``size`` windows of ``subset`` in an order that depends on (seed, stage, epoch) alone, [size].

    Position i of the epoch reads window ``stage_order(...)[i]``, so (stage, epoch, i) is all there is to resume.

    Args:
        subset: window numbers, easy first.
        size: windows of the stage, see :func:`stage_sizes`.
        epoch: passes over the stage's windows since the stage began.

    Raises:
        ValueError: size is not between 1 and the length of ``subset``.
    """
    if not 1 <= size <= len(subset):
        raise ValueError(f"a stage of {size} windows cannot be taken from {len(subset)}: give 1 to {len(subset)}")
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stage, epoch])))
    return np.asarray(subset)[draw.permutation(size)]


class ByTime:
    """Go on at fixed shares of the run.

    Args:
        boundaries: shares of the run's optimiser steps at which stages 1, 2, ... begin; see :func:`stage_at`.

    Raises:
        ValueError: boundaries are not strictly rising within (0, 1).
    """

    def __init__(self, boundaries: Sequence[float]):
        _check_boundaries(boundaries)
        self.boundaries = tuple(boundaries)


class ByPlateau:
    """Go on when the mean validation CE stands still.

    A check compares the mean of the last ``window`` evaluations with that of the ``window`` before them; it stalls if
    the improvement is less than ``eps``. ``patience`` stalled checks in a row end the stage. Each evaluation from the
    2 ``window``-th of a stage on is a check.

    Args:
        window: evaluations in a mean.
        eps: nats per token, at least 0.
        patience: checks, at least 1.

    Raises:
        ValueError: one of them is out of its range.
    """

    def __init__(self, window: int, eps: float, patience: int):
        check_patience(patience, 0.0)
        if window < 1 or not eps >= 0.0:
            raise ValueError(f"window ({window}) must be at least 1 evaluation, and eps ({eps}) at least 0")
        self.window, self.eps, self.patience = window, eps, patience
        self._values: deque[float] = deque(maxlen=2 * window)
        self._stalled = 0

    def observe(self, val_ce: float) -> bool:
        """True: the stage is over."""
        self._values.append(val_ce)
        if len(self._values) == 2 * self.window:
            values = list(self._values)
            gain = (math.fsum(values[: self.window]) - math.fsum(values[self.window :])) / self.window
            self._stalled = self._stalled + 1 if gain < self.eps else 0
        return self._stalled >= self.patience

    def restart(self) -> None:
        """Forget the stage that is over: a switch makes the CE jump, and the two would not compare."""
        self._values.clear()
        self._stalled = 0

    def earliest_evaluation(self, switch: int) -> int:
        """Number, from 1, of the evaluation that can first bring the ``switch``-th switch, from 1."""
        return switch * (2 * self.window + self.patience - 1)

    def state_dict(self) -> dict:
        return {"values": list(self._values), "stalled": self._stalled}

    def load_state_dict(self, state: dict) -> None:
        """Put back what :meth:`state_dict` gave."""
        self._values = deque(state["values"], maxlen=2 * self.window)
        self._stalled = state["stalled"]


class ByPatience:
    """Go on when validation CE has not improved by more than ``min_delta`` for ``patience`` evaluations in a row.

    A switch starts the count anew and keeps the best: a stage that begins worse has ``patience`` evaluations to come
    back below what the run had reached.

    Args:
        patience: evaluations, at least 1.
        min_delta: nats per token, at least 0.

    Raises:
        ValueError: one of them is out of its range.
    """

    def __init__(self, patience: int, min_delta: float = 0.0):
        check_patience(patience, min_delta)
        self.patience, self.min_delta = patience, min_delta
        self.best = math.inf
        """Best validation CE of the run, nats per token; inf before the first evaluation."""
        self._stalled = 0

    def observe(self, val_ce: float) -> bool:
        """True: the stage is over."""
        if val_ce < self.best - self.min_delta:
            self.best, self._stalled = val_ce, 0
        else:
            self._stalled += 1
        return self._stalled >= self.patience

    def restart(self) -> None:
        """Give the next stage its own patience."""
        self._stalled = 0

    def earliest_evaluation(self, switch: int) -> int:
        """Number, from 1, of the evaluation that can first bring the ``switch``-th switch, from 1."""
        return 1 + switch * self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "stalled": self._stalled}

    def load_state_dict(self, state: dict) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.best, self._stalled = state["best"], state["stalled"]


class Curriculum:
    """Which stage a run is in.

    Rules that watch the validation take the unweighted CE at temperature 1: the training loss jumps at every switch,
    since weights and temperature change there.

    Args:
        stages: volumes rise strictly and end at 1.
        rule: when to go on; one instance per curriculum, since it keeps what it has seen.

    Raises:
        ValueError: volumes as in :func:`stage_sizes`, or a number of boundaries that does not fit the stages.
    """

    def __init__(self, stages: Sequence[Stage], rule: ByTime | ByPlateau | ByPatience):
        _increments([stage.volume for stage in stages])
        if isinstance(rule, ByTime) and len(rule.boundaries) != len(stages) - 1:
            raise ValueError(
                f"{len(stages)} stages need {len(stages) - 1} boundaries between them, not {len(rule.boundaries)}"
            )
        self.stages, self.rule = tuple(stages), rule
        self.stage = 0
        """0-based number of the stage."""

    @property
    def settings(self) -> Stage:
        """What holds now."""
        return self.stages[self.stage]

    def advance(self, step: int, total_steps: int) -> bool:
        """Tell how far the run is, in optimiser steps; True: another stage has begun. Only time is asked here.

        Raises:
            ValueError: total_steps is below 1.
        """
        if not isinstance(self.rule, ByTime):
            return False
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1 optimiser step, not {total_steps}")
        before, self.stage = self.stage, stage_at(step / total_steps, self.rule.boundaries)
        return self.stage != before

    def observe(self, val_ce: float) -> bool:
        """Tell one evaluation, nats per token; True: another stage has begun. Time takes no notice of it.

        Raises:
            ValueError: val_ce is not finite.
        """
        check_finite(val_ce)
        if isinstance(self.rule, ByTime) or not self.rule.observe(val_ce) or self.stage == len(self.stages) - 1:
            return False
        self.stage += 1
        self.rule.restart()
        return True

    def check_evaluations(self, evaluations: int) -> None:
        """Before a run that looks at the validation ``evaluations`` times: can the curriculum leave its first stage?

        Raises:
            ValueError: it cannot, since its rule is never fed, or too rarely.
        """
        if isinstance(self.rule, ByTime) or len(self.stages) == 1:
            return
        needed = self.rule.earliest_evaluation(1)
        if evaluations < needed:
            raise ValueError(
                f"the curriculum would never leave its first stage: its rule needs {needed} evaluations and the run "
                f"has {evaluations}; evaluate more often, or lower patience or window"
            )

    def state_dict(self) -> dict:
        return {"stage": self.stage, "rule": {} if isinstance(self.rule, ByTime) else self.rule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.stage = state["stage"]
        if not isinstance(self.rule, ByTime):
            self.rule.load_state_dict(state["rule"])


def _increments(volumes: Sequence[float]) -> list[Fraction]:
    """What each stage adds to the one before."""
    if len(volumes) == 0:
        raise ValueError("a curriculum needs at least one stage: give the volumes, for example 0.25, 0.5, 0.75, 1")
    shown = ", ".join(map(str, volumes))
    if any(not a < b for a, b in pairwise([0.0, *volumes])):
        raise ValueError(f"the stages' volumes must rise strictly from above 0, not {shown}")
    if volumes[-1] != 1.0:
        raise ValueError(f"the stages' volumes must end at 1, which is all examples, not {shown}")
    ends = [Fraction(volume).limit_denominator(10**6) for volume in volumes]
    return [b - a for a, b in pairwise([Fraction(0), *ends])]


def _check_boundaries(boundaries: Sequence[float]) -> None:
    if any(not a < b for a, b in pairwise([0.0, *boundaries, 1.0])):
        shown = ", ".join(map(str, boundaries))
        raise ValueError(f"boundaries must rise strictly between 0 and 1, both left out, not {shown}")

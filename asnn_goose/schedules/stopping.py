"""Ending a run early, once validation CE no longer improves."""

import math


class EarlyStopping:
    """Says stop after ``patience`` evaluations in a row without an improvement, and knows where the best one was.

    An evaluation improves if val_ce < best - min_delta. Then it becomes the best, and the count starts anew.

    Within the grace period, up to and including step ``grace_steps``, the best is tracked but nothing counts: the
    count starts at 0 with the first evaluation after it. A best from within stays the one to beat, and the one to
    restore: val_ce is the unweighted CE, which weights, temperatures and stages do not enter.

    Args:
        patience: evaluations, at least 1.
        min_delta: nats per token that an improvement must exceed, at least 0.
        grace_steps: optimiser steps; reaches over the warm-up and the last switch of a curriculum.

    Raises:
        ValueError: one of them is out of its range.
    """

    def __init__(self, patience: int, min_delta: float = 0.0, grace_steps: int = 0):
        check_patience(patience, min_delta)
        if grace_steps < 0:
            raise ValueError(f"grace_steps must be at least 0, not {grace_steps}")
        self.patience, self.min_delta, self.grace_steps = patience, min_delta, grace_steps
        self.best = math.inf
        """Best validation CE, nats per token; inf before the first evaluation."""
        self.best_step: int | None = None
        """Optimiser step of the best; None before the first evaluation."""
        self._stalled = 0

    def observe(self, step: int, val_ce: float) -> bool:
        """Take one evaluation, after ``step`` optimiser steps; True: stop here.

        Raises:
            ValueError: val_ce is not finite.
        """
        check_finite(val_ce)
        if val_ce < self.best - self.min_delta:
            self.best, self.best_step = val_ce, step
            self._stalled = 0
        elif step > self.grace_steps:
            self._stalled += 1
        return self._stalled >= self.patience

    def state_dict(self) -> dict[str, float | int | None]:
        return {"best": self.best, "best_step": self.best_step, "stalled": self._stalled}

    def load_state_dict(self, state: dict) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.best, self.best_step, self._stalled = state["best"], state["best_step"], state["stalled"]


def earliest_stop(eval_every: int, patience: int, grace_steps: int = 0) -> int:
    """First optimiser step at which :class:`EarlyStopping` can stop, evaluated every ``eval_every`` steps.

    eval_every * (max(1, floor(grace_steps / eval_every)) + patience): the last evaluation of the grace period, or the
    first of all, is the best, and none after it improves. What begins later may never be reached.
    """
    check_patience(patience, 0.0)
    if eval_every < 1 or grace_steps < 0:
        raise ValueError(f"eval_every ({eval_every}) must be at least 1, and grace_steps ({grace_steps}) at least 0")
    return eval_every * (max(1, grace_steps // eval_every) + patience)


def check_patience(patience: int, min_delta: float) -> None:
    """Raises ValueError on a patience below 1 or a min_delta below 0."""
    if patience < 1:
        raise ValueError(f"patience must be at least 1 evaluation, not {patience}")
    if not min_delta >= 0.0:
        raise ValueError(f"min_delta must be at least 0, not {min_delta}")


def check_finite(val_ce: float) -> None:
    """Raises ValueError on a validation CE that no other can be compared with."""
    if not math.isfinite(val_ce):
        raise ValueError(f"val_ce must be finite, not {val_ce}: the run has diverged, lower the learning rate")

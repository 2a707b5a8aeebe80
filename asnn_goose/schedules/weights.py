"""Factors that change over a run, as pure functions of the optimiser step."""

import math
from typing import Literal


def warmup_cosine(step: int, total: int, warmup: float, end: float) -> float:
    """Factor of the learning rate for the update that follows ``step`` updates.

    Rises as (step + 1) / w over the first w = warmup * total updates, so that the first update already moves the
    weights, times a cosine from 1 at step 0 to ``end`` at step ``total``.

    Args:
        step: optimiser steps taken, 0 for the first update.
        total: optimiser steps of the run.
        warmup: share of the run that the rise takes; 0: none.
        end: factor at the end of the run.

    Raises:
        ValueError: total is below 1.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1 optimiser step, not {total}")
    rise = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rise * (end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total))))


def ramp(x: float, start: float, end: float, shape: Literal["linear", "cosine"] = "linear") -> float:
    """From ``start`` at x = 0 to ``end`` at x = 1, and constant outside: start + (end - start) f(x).

    f(x) = x (linear) or (1 - cos(pi x)) / 2 (cosine).

    Raises:
        ValueError: an x that is NaN, or another shape.
    """
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape must be linear or cosine, not {shape!r}")
    if math.isnan(x):
        raise ValueError("x must be a share of the ramp, not nan")
    if x >= 1.0:
        # start + (end - start) is not end to its last digit.
        return end
    x = max(x, 0.0)
    return start + (end - start) * (x if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * x)))

"""Factors that change over a run, as pure functions of the optimiser step."""

import math


def warmup_cosine(step: int, total: int, warmup: float, end: float) -> float:
    """Factor of the learning rate for the update that follows ``step`` updates.

    Rises as (step + 1) / w over the first w = warmup * total updates, so that the first update already moves the
    weights, times a cosine from 1 at step 0 to ``end`` at step ``total``.

    Args:
        step: optimiser steps taken, 0 for the first update.
        total: optimiser steps of the run.
        warmup: share of the run that the rise takes; 0: none.
        end: factor at the end of the run.
    """
    rise = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rise * (end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total))))

"""The objective: a weighted sum of named terms."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def combine(sums: Mapping[str, Tensor], weights: Mapping[str, float], count: float) -> tuple[Tensor, dict[str, float]]:
    """(sum_n w_n sums_n / count, metrics) with count the optimiser step's tokens over all micro-batches and processes.

    Args:
        sums: name -> sum over this micro-batch's valid tokens, in nats where it is a divergence.
        weights: name -> w_n; exactly the configured terms.
        count: global token count of the optimiser step (at least 1 is used, so that an empty step gives 0).

    Returns:
        The scalar to differentiate, and each ``loss_<name>_raw``, sums_n / count, as a number.

    Raises:
        KeyError: a configured term is missing from the step, or one that is not configured came.
        FloatingPointError: a term is not finite.
    """
    if set(sums) != set(weights):
        raise KeyError(f"the step gave the loss terms {sorted(sums)}, but {sorted(weights)} are configured")
    count = max(1.0, count)
    total = torch.zeros(())
    metrics = {}
    for name, weight in weights.items():
        raw = sums[name] / count
        value = raw.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss term {name} is {value}: lower train.lr, or look at the batch")
        total = total.to(raw.device) + weight * raw
        metrics[f"loss_{name}_raw"] = value
    return total, metrics

"""Whole numbers of spikes: written as digits, weighed, and added up over a text.

Shapes: ... any, C channels, T micro-steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpikeStatistics:
    """Counts over everything a neuron has emitted since recording began; all tensors are [C], int64."""

    values: int
    """Tokens."""
    spikes_C: Tensor
    """Spikes over tokens and micro-steps."""
    nonzero_C: Tensor
    """Tokens on which the channel's operand was not 0."""
    full_C: Tensor
    """Tokens on which the channel fired at every micro-step."""


def levels(kind: str, steps: int, base: int) -> int:
    """N of a neuron's operands k / N, |k| <= N: of radix neurons the greatest sum of spikes 1 or -1 times base^t."""
    return (base**steps - 1) // (base - 1) if kind == "radix" else steps


def digits(counts: Tensor, steps: int, base: int) -> Tensor:
    """Digits [T, ...] of whole numbers 0 <= k <= :func:`levels`, the greatest weight first, in their dtype.

    Base 2: 0 or 1. Base 3: -1, 0 or 1 (balanced ternary), which are the usual digits of k + N less 1, since N has a 1
    everywhere.
    """
    middle = (base - 1) // 2
    moved = counts + middle * levels("radix", steps, base)
    return torch.stack([torch.floor(moved / base**t) % base - middle for t in reversed(range(steps))])


def weighted(weights: Sequence[float], steps_T: Tensor) -> Tensor:
    """sum_t w_t x_t, in the dtype of x even under autocast, which would make a tensor product bfloat16."""
    weights_T = steps_T.new_tensor(weights)
    return (steps_T * weights_T.view(-1, *[1] * (steps_T.ndim - 1))).sum(0)

"""CTKD's learnable temperature (arXiv 2211.16231): it plays against the student behind a gradient reversal."""

import math

import torch
from torch import Tensor, nn

from asnn_goose.schedules.weights import ramp


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return -ctx.strength * grad_outputs[0], None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """x itself; its gradient is multiplied by -strength, strength = lambda >= 0.

    Raises:
        ValueError: strength is negative, which would turn the adversary into a helper.
    """
    if strength < 0:
        raise ValueError(f"lambda must be at least 0 (the reversal supplies the minus sign), not {strength}")
    return _Reverse.apply(x, strength)


class LearnableTemperature(nn.Module):
    """T = low + (high - low) sigmoid(raw): one raw scalar, two temperatures.

    ``module(lam)`` returns (T_adversarial, T_plain). Both have the same value. The gradient that reaches the raw
    parameter through T_adversarial is multiplied by -lam: only the distillation term may use it. The anchor and the
    logs use T_plain, since an anchor inside the reversal would push T away instead of back.

    The sigmoid keeps a slope (in float32 while raw < 16), where a clamp would leave a temperature beyond its bound
    without gradient.

    Args:
        init: T at the start, strictly between the bounds.
        low, high: bounds of T, never reached.
    """

    def __init__(self, init: float, low: float, high: float):
        super().__init__()
        if not low < init < high:
            raise ValueError(f"init ({init}) must lie strictly between low ({low}) and high ({high})")
        self.low, self.high = low, high
        share = (init - low) / (high - low)
        self.raw = nn.Parameter(torch.tensor(math.log(share / (1.0 - share))))

    def bounded(self, raw: Tensor) -> Tensor:
        """T of a raw value."""
        return self.low + (self.high - self.low) * torch.sigmoid(raw)

    def forward(self, lam: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.bounded(reverse_gradient(self.raw, lam)), self.bounded(self.raw)


class MinimisedTemperature(nn.Module):
    """T = clamp(exp(raw), low, high), trained like a weight. Not CTKD but the opposite game, kept to show its end.

    T^2 KL falls as T grows beyond its maximum, so a temperature that minimises it climbs to its upper bound; beyond it
    the clamp's slope is 0, and no regulariser brings it back. Interface of :class:`LearnableTemperature`.
    """

    def __init__(self, init: float, low: float, high: float):
        super().__init__()
        if not low < init < high:
            raise ValueError(f"init ({init}) must lie strictly between low ({low}) and high ({high})")
        self.low, self.high = low, high
        self.raw = nn.Parameter(torch.tensor(math.log(init)))

    def forward(self, lam: float = 0.0) -> tuple[Tensor, Tensor]:
        """Both temperatures; ``lam`` is left out of account, there is no reversal."""
        return self.raw.exp().clamp(self.low, self.high), self.raw.exp().clamp(self.low, self.high)


def anchor_penalty(temperature: Tensor, anchor: float, weight: float) -> Tensor:
    """c (T - a)^2: what pulls the temperature back to its anchor a."""
    return weight * (temperature - anchor) ** 2


def cosine_lambda(step: int, start: float, end: float) -> float:
    """Adversary's strength at an optimiser step: 0 up to ``start``, (1 - cos(pi x)) / 2 between, 1 from ``end`` on.

    Args:
        step: optimiser steps taken.
        start, end: optimiser steps, start < end; x = (step - start) / (end - start).
    """
    if not start < end:
        raise ValueError(f"lambda's ramp must start ({start}) before it ends ({end})")
    return ramp((step - start) / (end - start), 0.0, 1.0, "cosine")

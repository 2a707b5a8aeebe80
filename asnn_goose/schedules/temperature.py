"""CTKD's learnable temperature (arXiv 2211.16231): it plays against the student behind a gradient reversal.

Shapes: B windows, L predicted positions, C channels of what a temperature is read from.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
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
        ValueError: strength is negative, which would turn the adversary into a helper, or NaN.
    """
    if not strength >= 0.0:
        raise ValueError(f"lambda must be at least 0 (the reversal supplies the minus sign), not {strength}")
    return _Reverse.apply(x, strength)


class LearnableTemperature(nn.Module):
    """T = low + (high - low) sigmoid(raw): one raw scalar, two temperatures.

    ``module(lam)`` returns (T_adversarial, T_plain). Both have the same value. The gradient that reaches the raw
    parameter through T_adversarial is multiplied by -lam: only the distillation term may use it. The anchor and the
    logs use T_plain, since an anchor inside the reversal would push T away instead of back.

    The sigmoid keeps a slope at every raw value, where a clamp would leave a temperature beyond its bound without
    gradient.

    Args:
        init: T at the start, strictly between the bounds.
        low, high: bounds of T, reached only by rounding; low is at least 0, high finite.

    Raises:
        ValueError: bounds or start that are not so.
    """

    def __init__(self, init: float, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high
        self.raw = nn.Parameter(torch.tensor(_raw(init, low, high)))

    def forward(self, lam: float = 0.0) -> tuple[Tensor, Tensor]:
        return _bounded(reverse_gradient(self.raw, lam), self.low, self.high), _bounded(self.raw, self.low, self.high)

    def current(self) -> float:
        """T now."""
        return self()[1].item()


class InstanceTemperature(nn.Module):
    """T_i = low + (high - low) sigmoid(g(x_i)): a temperature for each window or for each predicted token.

    x_i are the states of teacher and student at the token, each normalised to mean 0 and variance 1, side by side; for
    a window their mean over its tokens. g is a perceptron of one hidden layer, whose output starts at the constant
    that gives T = init. The instance-wise form of CTKD reads the logits of both, which are never held here; their
    states determine them.

    ``module(features, mask, lam)`` returns (T_adversarial, T_plain), both [B, L], as :class:`LearnableTemperature`. No
    gradient reaches the features: neither model is steered through its temperature.

    Args:
        init: T at the start, strictly between the bounds.
        low, high: bounds of T, reached only by rounding; low is at least 0, high finite.
        channels: C, of both models' states together.
        scope: sequence or token.
        hidden: width of the hidden layer.

    Raises:
        ValueError: bounds or start that are not so.
    """

    recent: Tensor

    def __init__(
        self, init: float, low: float, high: float, channels: int, scope: Literal["sequence", "token"], hidden: int = 32
    ):
        super().__init__()
        self.low, self.high, self.scope = low, high, scope
        self.hidden, self.out = nn.Linear(channels, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, _raw(init, low, high))
        self.register_buffer("recent", torch.tensor(float(init)))

    def forward(self, features_BLC: Tensor, mask_BL: Tensor, lam: float = 0.0) -> tuple[Tensor, Tensor]:
        """Both temperatures of every position; ``mask`` says which count in a window's mean."""
        x = features_BLC.detach().float()
        if self.scope == "sequence":
            counted = mask_BL.bool()[..., None]
            # Not multiplied: what a masked position holds may be NaN.
            x = x.masked_fill(~counted, 0.0).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
        raw_BL = self.out(F.silu(self.hidden(x))).squeeze(-1).expand(mask_BL.shape)
        return _bounded(reverse_gradient(raw_BL, lam), self.low, self.high), _bounded(raw_BL, self.low, self.high)

    def current(self) -> float:
        """Mean of T over the tokens of the last step taken."""
        return self.recent.item()


def normalised_states(student_BLE: Tensor, teacher_BLE: Tensor) -> Tensor:
    """What an instance's temperature is read from, float32 [B, L, C], without gradient."""
    both = (student_BLE.detach().float(), teacher_BLE.detach().float())
    return torch.cat([F.layer_norm(x, x.shape[-1:]) for x in both], -1)


def _require_between(init: float, low: float, high: float) -> None:
    if low < 0.0:
        raise ValueError(f"low must be at least 0, not {low}: a temperature is above 0")
    if not low < init < high:
        raise ValueError(f"init ({init}) must lie strictly between low ({low}) and high ({high})")


def _raw(init: float, low: float, high: float) -> float:
    """The value whose bounded temperature is init."""
    _require_between(init, low, high)
    if not math.isfinite(high):
        raise ValueError(f"high must be finite, not {high}: a sigmoid has no way to an infinite bound")
    # Not of the share between the bounds, which is 1 to rounding where init is the neighbour of high.
    return math.log(init - low) - math.log(high - init)


def _bounded(raw: Tensor, low: float, high: float) -> Tensor:
    # Held at 60 in the value and not in the gradient: beyond 87 the slope e^-|raw| is below float32's numbers, and an
    # anchor could not pull such a temperature back.
    raw = raw.detach().clamp(-60.0, 60.0) + (raw - raw.detach())
    # From the nearer bound: beyond 16, sigmoid(raw) is 1 in float32 and its derivative s (1 - s) is 0.
    span = high - low
    return torch.where(raw > 0, high - span * torch.sigmoid(-raw), low + span * torch.sigmoid(raw))


class MinimisedTemperature(nn.Module):
    """T = clamp(exp(raw), low, high), trained like a weight. Not CTKD but the opposite game, kept to show its end.

    T^2 KL falls as T grows beyond its maximum, so a temperature that minimises it climbs to its upper bound; beyond it
    the clamp's slope is 0, and no regulariser brings it back. Interface of :class:`LearnableTemperature`.

    Raises:
        ValueError: init does not lie strictly between the bounds, or low is below 0.
    """

    def __init__(self, init: float, low: float, high: float):
        super().__init__()
        _require_between(init, low, high)
        self.low, self.high = low, high
        self.raw = nn.Parameter(torch.tensor(math.log(init)))

    def forward(self, lam: float = 0.0) -> tuple[Tensor, Tensor]:
        """Both temperatures; ``lam`` is left out of account, there is no reversal."""
        # Two tensors: a training step reads the gradient that arrives at the first, without the anchor's.
        return self.raw.exp().clamp(self.low, self.high), self.raw.exp().clamp(self.low, self.high)

    def current(self) -> float:
        """T now."""
        return self()[1].item()


def anchor_penalty(temperature: Tensor, anchor: float, weight: float) -> Tensor:
    """c (T - a)^2 of each temperature: what pulls it back to its anchor a."""
    return weight * (temperature - anchor) ** 2


def cosine_lambda(step: int, start: float, end: float) -> float:
    """Adversary's strength at an optimiser step: 0 up to ``start``, (1 - cos(pi x)) / 2 between, 1 from ``end`` on.

    Args:
        step: optimiser steps taken.
        start, end: optimiser steps, start < end; x = (step - start) / (end - start).

    Raises:
        ValueError: a step that is NaN, or a start that is not below end.
    """
    if math.isnan(step):
        raise ValueError("step must be a number of optimiser steps, not nan")
    if not start < end:
        raise ValueError(f"lambda's ramp must start ({start}) before it ends ({end})")
    return ramp((step - start) / (end - start), 0.0, 1.0, "cosine")

"""The count and its tallies, one tensor operation at a time: the plain forms that the fast ones are checked against.

Shapes: ... any, C channels.
"""

import torch
from torch import Tensor

SCALE_FLOOR = 1e-6
"""Smallest per-token scale: a token whose current is 0 everywhere stays 0 instead of becoming NaN."""


def token_scale(x_xC: Tensor) -> Tensor:
    """m = mean_c |x_c| of each token, [..., 1], and no less than SCALE_FLOOR."""
    return x_xC.abs().mean(-1, keepdim=True).clamp_min(SCALE_FLOOR)


class _StraightThrough(torch.autograd.Function):
    """k / N of u; the gradient is [|u| <= 1]."""

    @staticmethod
    def forward(ctx, u, levels, offset, silence):
        size = u.abs()
        ctx.save_for_backward(size <= 1.0)
        counts = torch.floor(size.clamp(max=1.0) * levels + offset)
        if silence is not None:
            counts = torch.where(size < silence, 0.0, counts)
        return u.sign() * counts / levels

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0] * ctx.saved_tensors[0], None, None, None


def count_reference(x_xC, levels, threshold, per_token, offset, silence) -> tuple[Tensor, Tensor]:
    """(s, gain); see the package. ``silence`` is in units of u."""
    gain = threshold * token_scale(x_xC) if per_token else threshold
    s = _StraightThrough.apply(x_xC / gain, levels, offset, silence)
    assert isinstance(s, Tensor)
    return s, gain


def tally_reference(s_xC: Tensor, levels: int, spikes_K: Tensor, steps: int) -> Tensor:
    """[3, C]; see tally.py."""
    counts_NC = (s_xC.reshape(-1, s_xC.shape[-1]).abs() * levels).clamp(max=levels).round().nan_to_num().long()
    fired_NC = spikes_K.to(s_xC.device)[counts_NC]
    return torch.stack([fired_NC.sum(0), (counts_NC > 0).sum(0), (fired_NC == steps).sum(0)])


def on_and_off_levels_reference(s: Tensor, levels: int) -> tuple[int, int]:
    """See tally.py."""
    # The levels are divided out again: 1/13 * 13 is not 1 in float32.
    on_level = (s == (s * levels).round() / levels) & (s.abs() <= 1.0)
    return int((on_level & (s != 0)).sum()), int((~on_level).sum())

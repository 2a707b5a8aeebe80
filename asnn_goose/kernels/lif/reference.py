"""Leaky integrate-and-fire, one micro-step at a time: the plain form that the fast ones are checked against.

Shapes: T micro-steps, ... any, C channels (last axis; threshold and decay broadcast against it).
"""

import torch
from torch import Tensor

from asnn_goose.kernels.lif.fused import Dynamics
from asnn_goose.kernels.lif.surrogate import derivative


class _Fire(torch.autograd.Function):
    """s = sign(v) [|v| >= theta] (ternary) or [v >= theta] (binary), and NaN where v is.

    ds/dv = g(u), ds/dtheta = -sign(v) g(u).
    """

    @staticmethod
    def forward(ctx, v, threshold, kind, surrogate, width):
        ctx.save_for_backward(v, threshold)
        ctx.kind, ctx.surrogate, ctx.width = kind, surrogate, width
        size = v if kind == "binary" else v.abs()
        s = (size >= threshold).to(v.dtype)
        return torch.where(v.isnan(), v, s if kind == "binary" else torch.sign(v) * s)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_s,) = grad_outputs
        v, threshold = ctx.saved_tensors
        if ctx.kind == "binary":
            grad_v = grad_s * derivative(v - threshold, ctx.surrogate, ctx.width)
            grad_threshold = -grad_v
        else:
            grad_v = grad_s * derivative(v.abs() - threshold, ctx.surrogate, ctx.width)
            grad_threshold = -torch.sign(v) * grad_v
        return grad_v, grad_threshold.sum_to_size(threshold.shape), None, None, None


def _micro_step(v, x, threshold, decay, dynamics: Dynamics):
    v = decay * v + x
    s = _Fire.apply(v, threshold, dynamics.kind, dynamics.surrogate, dynamics.width)
    fired = s.detach() if dynamics.detach_reset else s
    if dynamics.reset == "soft":
        # The subtracted theta belongs to the reset path too: it carries no gradient when the reset is detached.
        v = v - fired * (threshold.detach() if dynamics.detach_reset else threshold)
    elif dynamics.detach_reset:
        # v (1 - |s|) would be NaN for an infinite membrane. One that is NaN, as its spike, is not reset.
        v = torch.where(fired.abs() > 0.0, 0.0, v)
    else:
        # |s| written as s sign(v), whose derivative is the surrogate's also where s = 0; autograd's |s| has none there.
        v = v * (1.0 - (fired if dynamics.kind == "binary" else fired * torch.sign(v.detach())))
    return s, v


def lif_reference(current_TxC, threshold, decay, v0, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """All micro-steps of v_t = decay v_{t-1} + x_t, fire, reset; returns (spikes_TxC, v_xC after the last reset)."""
    v = v0 if v0 is not None else torch.zeros_like(current_TxC[0])
    spikes = []
    for x in current_TxC.unbind(0):
        s, v = _micro_step(v, x, threshold, decay, dynamics)
        spikes.append(s)
    return torch.stack(spikes), v


def lif_rate_reference(current_xC, threshold, decay, v0, dynamics: Dynamics) -> Tensor:
    """Mean spike of ``dynamics.steps`` micro-steps that all receive ``current_xC``."""
    v = v0 if v0 is not None else torch.zeros_like(current_xC)
    total = torch.zeros_like(current_xC)
    for _ in range(dynamics.steps):
        s, v = _micro_step(v, current_xC, threshold, decay, dynamics)
        total = total + s
    return total / dynamics.steps

"""The autograd side that the compiled forms of count share.

A form is a module with ``forward``, which writes into tensors that it is given, and ``backward``. Kept for backward are
the current and each token's scale m. With g the gradient arriving at s and h the one at m (which comes through the
gain, whose product with theta is left to autograd),

    dx_c     = g_c [|u_c| <= 1] / gain_c + sign(x_c) dm / C       the second term where m is not at its floor
    dtheta_c = -sum_n g_c [|u_c| <= 1] u_c / theta_c,      dm = h - sum_c g_c [|u_c| <= 1] u_c / m

Shapes: ... any, N tokens, C channels.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from asnn_goose.kernels.once import differentiable_once


class Rounding(NamedTuple):
    """What does not change from token to token."""

    levels: int
    """N."""
    per_token: bool
    offset: float


class FusedCount(torch.autograd.Function):
    """(s_xC, m [..., 1]) of float32 currents; ``silence`` is divided by theta already, scalar or [C], or None."""

    @staticmethod
    def forward(ctx, x_xC, threshold, silence, rounding: Rounding, form: ModuleType):
        C = x_xC.shape[-1]
        ctx.rounding, ctx.form = rounding, form
        x_NC = x_xC.reshape(-1, C).contiguous()
        # Views are handed on, not out: autograd lets nobody change in place what a Function returns as a view.
        s, scale = x_xC.new_empty(x_xC.shape), x_xC.new_empty(*x_xC.shape[:-1], 1)
        silence = None if silence is None else silence.contiguous()
        form.forward(x_NC, threshold.reshape(-1).contiguous(), silence, rounding, s.view(x_NC.shape), scale.view(-1))
        ctx.save_for_backward(x_xC, threshold, scale)
        return s, scale

    @staticmethod
    @differentiable_once
    def backward(ctx, *grad_outputs):
        x_xC, threshold, scale = ctx.saved_tensors
        grad_s, grad_scale = grad_outputs
        C = x_xC.shape[-1]
        rows: list[Tensor] = [tensor.reshape(-1, C).contiguous() for tensor in (x_xC, grad_s)]
        grad_x_NC, grad_theta = ctx.form.backward(
            *rows,
            threshold.reshape(-1).contiguous(),
            scale.reshape(-1),
            grad_scale.reshape(-1).contiguous(),
            ctx.rounding,
        )
        if threshold.numel() == 1:
            grad_theta = grad_theta.sum()
        return grad_x_NC.view(x_xC.shape), grad_theta.view(threshold.shape).to(threshold.dtype), None, None, None

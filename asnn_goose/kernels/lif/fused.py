"""The autograd side that the compiled forms of lif and lif_rate share: what is saved, and in which dtype.

A form is a module with ``forward``, which writes its results into tensors that it is given, and ``backward``, both over
an :class:`Inputs`. Between the two only the input current is kept, in the dtype it came in: backward charges the
membrane again.

Shapes: T micro-steps, S stored steps (T, or 1 where one current serves all of them), N rows, C channels.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from asnn_goose.kernels.once import differentiable_once


class Dynamics(NamedTuple):
    """What does not change from micro-step to micro-step."""

    steps: int
    """T."""
    mean: bool
    """One current for all micro-steps, and the mean of their spikes, instead of T currents and T spikes."""
    kind: str
    reset: str
    detach_reset: bool
    surrogate: str
    width: float


class Inputs(NamedTuple):
    """Contiguous; threshold and decay have one entry or C of them."""

    x_SNC: Tensor
    threshold: Tensor
    decay: Tensor
    v0_NC: Tensor | None


class Gradients(NamedTuple):
    """threshold and decay: per channel, or summed already where the input has one entry."""

    x_SNC: Tensor
    threshold: Tensor
    decay: Tensor
    v0_NC: Tensor | None


def _flat(per_channel: Tensor) -> Tensor:
    return per_channel.reshape(-1).contiguous()


def _inputs(current: Tensor, threshold: Tensor, decay: Tensor, v0: Tensor | None, mean: bool) -> Inputs:
    S, C = 1 if mean else current.shape[0], current.shape[-1]
    v0_NC = None if v0 is None else v0.reshape(-1, C).contiguous()
    return Inputs(current.reshape(S, -1, C).contiguous(), _flat(threshold), _flat(decay), v0_NC)


class FusedLIF(torch.autograd.Function):
    """(spikes in the current's dtype, or their mean in float32; last membrane in float32, None with ``mean``)."""

    @staticmethod
    def forward(ctx, current, threshold, decay, v0, dynamics: Dynamics, form: ModuleType):
        ctx.set_materialize_grads(False)
        ctx.dynamics, ctx.form = dynamics, form
        ctx.save_for_backward(current, threshold, decay, v0)
        inputs = _inputs(current, threshold, decay, v0, dynamics.mean)
        # Views are handed on, not out: autograd lets nobody change in place what a Function returns as a view.
        spikes = current.new_empty(current.shape, dtype=torch.float32 if dynamics.mean else current.dtype)
        v = None if dynamics.mean else current.new_empty(current.shape[1:], dtype=torch.float32)
        v_NC = None if v is None else v.view(inputs.x_SNC.shape[1:])
        form.forward(inputs, dynamics, spikes.view(inputs.x_SNC.shape), v_NC)
        return spikes, v

    @staticmethod
    @differentiable_once
    def backward(ctx, *grad_outputs):
        current, threshold, decay, v0 = ctx.saved_tensors
        inputs = _inputs(current, threshold, decay, v0, ctx.dynamics.mean)
        grad_spikes, grad_v = grad_outputs
        if grad_spikes is not None:
            grad_spikes = grad_spikes.reshape(inputs.x_SNC.shape).contiguous()
        if grad_v is not None:
            grad_v = grad_v.reshape(inputs.x_SNC.shape[1:]).contiguous()
        parameters = any(ctx.needs_input_grad[1:3])
        found = ctx.form.backward(inputs, ctx.dynamics, grad_spikes, grad_v, parameters)
        shared = (
            (grad.sum() if leaf.numel() == 1 else grad).view(leaf.shape)
            for grad, leaf in ((found.threshold, threshold), (found.decay, decay))
        )
        grad_v0 = None if v0 is None else found.v0_NC.view(v0.shape)
        return found.x_SNC.to(current.dtype).view(current.shape), *shared, grad_v0, None, None

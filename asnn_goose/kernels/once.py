"""Backward passes that have no derivative of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of an autograd.Function's ``backward``: a second derivative through it raises RuntimeError.

    PyTorch's once_differentiable does so only where the incoming gradient depends on something: that of a plain sum
    does not, and its second derivative would be dropped without a word.
    """
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *grad_outputs):
        # Enabled inside a backward pass by create_graph alone.
        if torch.is_grad_enabled():
            grad_outputs = [
                grad if grad is None or grad.requires_grad else grad.detach().requires_grad_() for grad in grad_outputs
            ]
        return guarded(ctx, *grad_outputs)

    return wrapper

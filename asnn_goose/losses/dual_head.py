"""The logit loss of Dual-Head Knowledge Distillation (DHKD, arXiv 2411.08937).

An auxiliary head beside the student's own takes this loss, the own head keeps cross-entropy: on one head the two pull
its rows in opposite directions. The auxiliary head serves training only and is discarded at inference.

Shapes: N rows, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from asnn_goose.kernels.precision import widened
from asnn_goose.losses.divergence import divergence


class _LogCosh(torch.autograd.Function):
    """Saves its input alone: the derivative is tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        size = x.abs()
        large = size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)
        # Below 1 the large form subtracts nearly equal numbers; above, the square of sinh would overflow at 2 * 44.
        small = torch.log1p(2.0 * torch.sinh(size.clamp_max(1.0) / 2.0).square())
        return torch.where(size < 1.0, small, large)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * torch.tanh(x)


def log_cosh(x: Tensor) -> Tensor:
    """log cosh x, to rounding near 0, where it is x^2 / 2, and without overflow far out, where it is |x| - log 2."""
    return _LogCosh.apply(x)  # pyright: ignore[reportReturnType]


def dual_head_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float, centred: bool) -> Tensor:
    """tau^2 sum_k log cosh((s_k - t_k) / (2 tau)) [N], over the tokens k that the teacher allows."""
    banned_NV = teacher_NV == -torch.inf
    student_NV, teacher_NV = (widened(x) for x in (student_NV, teacher_NV))
    # Filled before the difference: -inf - -inf is NaN.
    gap_NV = student_NV.masked_fill(banned_NV, 0.0) - teacher_NV.masked_fill(banned_NV, 0.0)
    if centred:
        allowed_N1 = (~banned_NV).sum(-1, keepdim=True).clamp_min(1)
        gap_NV = (gap_NV - gap_NV.sum(-1, keepdim=True) / allowed_N1).masked_fill(banned_NV, 0.0)
    return (temperature**2 * log_cosh(gap_NV / (2.0 * temperature))).sum(-1)


def dual_head(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, tau: float = 2.0, centred: bool = True
) -> Tensor:
    """tau^2 sum_k log cosh((s_k - t_k) / (2 tau)), token mean.

    Each summand is tau^2 times the KL from a fair coin to one that falls with sigmoid((s_k - t_k) / tau), which is how
    the paper writes it. It is a sum over the vocabulary: (s - t)^2 / 8 per token of the vocabulary while logits differ
    by less than tau, tau |s - t| / 2 far out. The gradient of a logit is tau/2 tanh((s - t) / (2 tau)), at most tau/2.

    Args:
        student_logits: [..., V], of the auxiliary head.
        teacher_logits: [..., V], without gradient; -inf where a token is banned, which then takes no part.
        mask: [...], true where a token counts; an empty mask gives 0.
        tau: softness, above 0.
        centred: subtract each row's mean from its logits on both sides first. A softmax does not see a constant that is
            added to its logits, this loss does, and a language model's logits have an arbitrary one. The paper's own
            form, for classifiers of images, is False.
    """
    return divergence(dual_head_rows, student_logits, teacher_logits, mask, tau, centred=centred)

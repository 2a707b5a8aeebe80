"""Divergences between full logits: masking and the token mean around the kernel's row formulas.

Shapes: B batch, L tokens, V vocabulary; logits may have any leading shape, the mask has that shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import ce_rows, forward_kl_rows


def token_mean(rows: Callable[..., Tensor], *per_token: Tensor, mask: Tensor | None) -> Tensor:
    """sum(m * value) / max(1, sum(m)) over tokens; masked tokens are dropped before ``rows`` sees them.

    Dropping instead of multiplying keeps whatever a masked position holds, NaN included, out of value and gradient. An
    empty mask gives 0 with a graph.
    """
    flat = [x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.flatten() for x in per_token]
    if mask is not None:
        keep = mask.flatten().bool()
        flat = [x[keep] for x in flat]
    return rows(*flat).sum() / max(1, flat[0].shape[0])


def _check_mask(student_logits: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"mask {tuple(mask.shape)} must have the logits' leading shape {tuple(student_logits.shape[:-1])}"
        )


def _check(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must have "
            "one shape"
        )
    _check_mask(student_logits, mask)
    temperature = torch.as_tensor(temperature)
    if temperature.ndim or not temperature.detach() > 0:
        raise ValueError(f"temperature must be one number above 0, not {temperature.tolist()}")
    if teacher_logits.is_inference() and temperature.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("teacher logits were made under inference_mode; use no_grad, so that T can be learned")


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), token mean in nats (arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: [..., V], any float dtype (computed in float32 at least); the teacher's may be
            -inf where a token is banned.
        mask: [...], true where a token counts; an empty mask gives 0.
        temperature: T > 0, number or scalar tensor; its gradient is live in T^2 and in both softmaxes.
    """
    _check(student_logits, teacher_logits, mask, temperature)
    return token_mean(
        lambda s, t: forward_kl_rows(s, t, temperature), student_logits, teacher_logits.detach(), mask=mask
    )


def cross_entropy(student_logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log softmax(s)[target], token mean in nats; targets [...] already shifted to the position that predicts them."""
    if targets.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the logits' leading shape {tuple(student_logits.shape[:-1])}"
        )
    _check_mask(student_logits, mask)
    return token_mean(ce_rows, student_logits, targets, mask=mask)

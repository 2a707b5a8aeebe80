"""Divergences between full logits: masking and the token mean around the kernel's row formulas.

Shapes: B batch, L tokens, V vocabulary; logits may have any leading shape, the mask has that shape.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import rows
from asnn_goose.kernels.precision import floating, wide_dtype


def token_mean(formula: Callable[..., Tensor], *per_token: Tensor, mask: Tensor | None) -> Tensor:
    """sum(m * value) / max(1, sum(m)) over tokens; masked tokens are dropped before the formula sees them.

    All of ``per_token`` share the leading axes of the first, [..., C], which become one; the mask has just these.
    Dropping instead of multiplying keeps whatever a masked position holds, NaN included, out of value and gradient. An
    empty mask gives 0 with a graph.
    """
    leading = per_token[0].ndim - 1
    flat = [x.reshape(-1, *x.shape[leading:]) for x in per_token]
    if mask is not None:
        keep = mask.flatten().bool()
        flat = [x[keep] for x in flat]
    return formula(*flat).sum() / max(1, flat[0].shape[0])


def check_mask(student_logits: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"mask {tuple(mask.shape)} must have the logits' leading shape {tuple(student_logits.shape[:-1])}"
        )


def _check(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must have "
            "one shape"
        )
    check_mask(student_logits, mask)
    shape = (*student_logits.shape[:-1], 1)
    alike = len(temperature.shape) == len(shape)
    if temperature.ndim and not (alike and all(n in (1, m) for n, m in zip(temperature.shape, shape, strict=True))):
        raise ValueError(f"temperature {tuple(temperature.shape)} must be one number, or broadcast to {shape}")
    rows.check_temperature(temperature)
    if teacher_logits.is_inference() and temperature.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("teacher logits were made under inference_mode; use no_grad, so that T can be learned")


def divergence(
    formula: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor | float,
    **options,
) -> Tensor:
    """The token mean of a row formula, for every divergence alike.

    Args:
        formula: of kernels.linear_divergence.rows.
        student_logits, teacher_logits: [..., V], of any dtype (computed in float32 at least); the teacher's may be
            -inf where a token is banned, and receive no gradient.
        mask: [...], true where a token counts; an empty mask gives 0.
        temperature: T > 0, a number, a tensor of one element, one T for each token [...], or a tensor of the logits'
            dimensions whose last is 1, such as [B, 1, 1], which gives each token its own T^2 KL before the mean (CTKD's
            instance-wise form, arXiv 2211.16231). Its gradient is live in the factor and in both softmaxes.
        options: the formula's own.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not a finite number above 0.
        RuntimeError: the teacher's logits were made under inference_mode, and the temperature wants a gradient.
    """
    student_logits, teacher_logits = floating(student_logits), floating(teacher_logits)
    wide = wide_dtype(student_logits.dtype)
    temperature = torch.as_tensor(temperature, dtype=wide, device=student_logits.device)
    if temperature.numel() == 1:
        temperature = temperature.reshape(())
    elif temperature.shape == student_logits.shape[:-1]:
        temperature = temperature.unsqueeze(-1)
    _check(student_logits, teacher_logits, mask, temperature)
    temperature = temperature.expand(*student_logits.shape[:-1], 1)
    return token_mean(partial(formula, **options), student_logits, teacher_logits.detach(), temperature, mask=mask)


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    """T^2 KL(p || q), p = softmax(t/T), q = softmax(s/T), token mean in nats (arXiv 1503.02531).

    Arguments and errors of this and the other divergences: see :func:`divergence`.
    """
    return divergence(rows.forward_kl_rows, student_logits, teacher_logits, mask, temperature)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    """T^2 KL(q || p), token mean in nats (MiniLLM, arXiv 2306.08543), on the tokens that the teacher allows."""
    return divergence(rows.reverse_kl_rows, student_logits, teacher_logits, mask, temperature)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q, token mean in nats (arXiv 2306.13649).

    Raises:
        ValueError: beta outside (0, 1); at the ends the value is 0, not a KL.
    """
    rows.check_options("jensen_shannon", {"beta": beta})
    return divergence(rows.jensen_shannon_rows, student_logits, teacher_logits, mask, temperature, beta=beta)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    skew: float = 0.1,
    reverse: bool = False,
) -> Tensor:
    """T^2 KL(p || skew p + (1 - skew) q), or with ``reverse`` T^2 KL(q || (1 - skew) p + skew q) (arXiv 2402.03898).

    Token mean in nats.

    Raises:
        ValueError: skew outside [0, 1).
    """
    rows.check_options("skew_kl", {"skew": skew})
    formula = rows.skew_kl_rows
    return divergence(formula, student_logits, teacher_logits, mask, temperature, skew=skew, reverse=reverse)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    """Forward and reverse KL, weighted by where p and q differ, head or tail (arXiv 2404.02657); token mean, nats."""
    return divergence(rows.adaptive_kl_rows, student_logits, teacher_logits, mask, temperature)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    """T/2 sum |p - q|, token mean, in [0, T]."""
    return divergence(rows.total_variation_rows, student_logits, teacher_logits, mask, temperature)


def cross_entropy(student_logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log softmax(s)[target], token mean in nats; targets [...] already shifted to the position that predicts them.

    Raises:
        ValueError: shapes that do not fit, or a target that counts outside [0, V).
    """
    if targets.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the logits' leading shape {tuple(student_logits.shape[:-1])}"
        )
    check_mask(student_logits, mask)
    rows.check_ids("targets hold", targets if mask is None else targets[mask.bool()], student_logits.shape[-1])
    return token_mean(rows.ce_rows, floating(student_logits), targets, mask=mask)

"""Distillation from a part of the teacher's distribution: its k best tokens, or a random sample.

Shapes: ... any leading shape, V vocabulary, K kept tokens, N drawn tokens.
"""

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import rows
from asnn_goose.kernels.precision import floating, wide_dtype, widened
from asnn_goose.losses.divergence import check_mask, divergence, token_mean


def tail_bucket_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
) -> Tensor:
    """T^2 KL over the teacher's k best tokens and one bucket for all others, token mean in nats.

    The gradient on a kept token is exact; the others share the bucket's exact total in the student's own proportions.
    Never above the full KL, and equal to it for k >= V.

    Raises:
        ValueError: k is below 1, or as for :func:`divergence.divergence`.
    """
    rows.check_options("tail_bucket_kl", {"k": k})
    return divergence(rows.tail_bucket_kl_rows, student_logits, teacher_logits, mask, temperature, k=k)


def tcs(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
) -> Tensor:
    """T^2 KL over the teacher's k best tokens with both sides renormalised on them, token mean in nats. Biased.

    It is 0 for every student with the right ratios within the k best, however much mass lies elsewhere;
    :func:`tail_bucket_kl` is its correction. Kept because it has been used (target concrete score, arXiv 2504.16431, as
    implemented for autoregressive teachers).

    Raises:
        ValueError: k is below 1, or as for :func:`divergence.divergence`.
    """
    rows.check_options("tcs", {"k": k})
    return divergence(rows.tcs_rows, student_logits, teacher_logits, mask, temperature, k=k)


def draw_targets(
    teacher_logits: Tensor, samples: int, power: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A sparse, unbiased estimate of the teacher's distribution (RS-KD, arXiv 2503.16870).

    N tokens are drawn with replacement from r, r proportional to p^power; each draw carries p / (N r), so that the sum
    of a token's draws has the expectation p. The weights are not normalised: their sum is 1 only for power 1.

    Args:
        teacher_logits: [..., V].
        samples: N.
        power: 1 draws from the teacher itself.

    Returns:
        (ids [..., N], weights [..., N] in float32, or float64 for float64 logits).

    Raises:
        ValueError: samples is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    with torch.no_grad():
        log_p = torch.log_softmax(widened(teacher_logits), -1)
        # A banned token stays banned: 0 * -inf would be NaN.
        log_r = torch.log_softmax((power * log_p).masked_fill(log_p == -torch.inf, -torch.inf), -1)
        flat = log_r.exp().reshape(-1, log_r.shape[-1])
        ids = torch.multinomial(flat, samples, replacement=True, generator=generator)
        ids = ids.view(*log_r.shape[:-1], samples)
        return ids, (log_p.gather(-1, ids) - log_r.gather(-1, ids)).exp() / samples


def random_sampling_ce(
    student_logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
) -> Tensor:
    """-sum_n weight_n log softmax(s/T)[id_n], token mean in nats: the cross-entropy against drawn targets.

    Its value and its gradient in s have the expectation of the full cross-entropy against the teacher (for T = 1). A
    divergence from the same draws would be biased, since the entropy of a sample is not that of the teacher.

    Raises:
        ValueError: for a temperature that wants a gradient, which the sample cannot give it, or that is not above 0; or
            unequal shapes.
    """
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError("random-sampling targets cannot train a temperature: fix it, or use tail_bucket_kl")
    if not float(temperature) > 0:
        raise ValueError(f"temperature must be above 0, not {float(temperature)}")
    if ids.shape != weights.shape or ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"ids {tuple(ids.shape)} and weights {tuple(weights.shape)} must be one row for each of the logits' "
            f"{tuple(student_logits.shape[:-1])} tokens"
        )
    check_mask(student_logits, mask)
    student_logits, weights = floating(student_logits), floating(weights)
    wide = wide_dtype(student_logits.dtype)

    def formula(student_NV: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        log_q = torch.log_softmax(student_NV.to(wide) / temperature, -1)
        return -(weights_NK * log_q.gather(-1, ids_NK)).sum(-1)

    return token_mean(formula, student_logits, ids, weights, mask=mask)

"""The value of each divergence for one row of logits: the only place where its formula stands.

Every function takes logits [N, V] (the teacher's may hold -inf), a temperature T (a number, a scalar tensor, or [N, 1])
and returns nats [N] in float32 or float64, T^2 included (T for the total variation, whose gradient falls as 1/T),
differentiable in the student's logits and in all three places of T. p = softmax(t/T), q = softmax(s/T).

A token that the teacher bans has p = 0. Where a formula divides by p or takes its logarithm (reverse KL and what is
built on it), the student is renormalised on the tokens that the teacher allows: the value is then finite, and a banned
token receives no gradient.

Shapes: N rows, V vocabulary, K kept tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.kernels.linear_divergence.tail import log_tail
from asnn_goose.kernels.precision import wide_dtype, widened


def check_temperature(temperature: Tensor) -> None:
    """Raises ValueError unless every T is above 0 and finite."""
    given = temperature.detach()
    outside = given[~((given > 0) & given.isfinite())]
    if outside.numel():
        wanted = "finite" if outside[0] == math.inf else "above 0"
        raise ValueError(f"temperature must be {wanted}, not {outside[0].item():g}")


def check_ids(holder: str, ids: Tensor, V: int) -> None:
    """Raises ValueError for a token outside the vocabulary; ``holder`` begins the sentence: "targets hold"."""
    outside = ids[(ids < 0) | (ids >= V)]
    if outside.numel():
        raise ValueError(f"{holder} the token {int(outside[0])}, outside a vocabulary of {V}: mask its row")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that the divergence ``name`` does not take, or a value that it has none for."""
    known = OPTIONS.get(name, ())
    if set(options) - set(known):
        takes = f"takes {' and '.join(known)}" if known else "takes no options"
        raise ValueError(f"{name} {takes}, not {', '.join(sorted(set(options) - set(known)))}")
    beta, skew, k = options.get("beta", 0.5), options.get("skew", 0.1), options.get("k", 1)
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, not {beta}: use forward_kl or reverse_kl at the ends"
        )
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew must lie in [0, 1), not {skew}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")


def _log_softmax(logits_NV: Tensor, temperature: Tensor | float) -> Tensor:
    # A sum over 50,000 terms in bfloat16 makes a small divergence negative.
    logits_NV = widened(logits_NV)
    # A banned token never meets T: the derivative of -inf / T is infinite, and times 0 it is NaN. So is that of the
    # smallest numbers, with which tokens are banned too, at T < 1: the derivative -l / T^2 must be a number.
    T = torch.as_tensor(temperature, dtype=logits_NV.dtype, device=logits_NV.device).detach()
    banned_NV = logits_NV < torch.finfo(logits_NV.dtype).min * T.clamp(max=1.0) ** 2
    return F.log_softmax((logits_NV.masked_fill(banned_NV, 0.0) / temperature).masked_fill(banned_NV, -torch.inf), -1)


def _times_T(rows_N: Tensor, temperature: Tensor | float, power: int = 2) -> Tensor:
    T = torch.as_tensor(temperature, dtype=rows_N.dtype, device=rows_N.device)
    return rows_N * (T.squeeze(-1) if T.ndim else T) ** power


FAINT = 1e-30
"""Probabilities below it add nothing to a sum that any of the others is part of."""


class _RelativeEntropy(torch.autograd.Function):
    """sum a log(a/b) - a + b of each row, from the logarithms: KL(a || b) of two distributions, whose sums are equal.

    No term is negative, and an error of the partition functions enters squared instead of at full size, where T^2 would
    multiply it. As one operation it keeps its inputs alone for the backward pass.
    """

    @staticmethod
    def forward(ctx, log_a_NV, log_b_NV):
        ctx.save_for_backward(log_a_NV, log_b_NV)
        a_NV, gap_NV, rest_NV = _gap_and_rest(log_a_NV, log_b_NV)
        return (a_NV * gap_NV + rest_NV).sum(-1)

    @staticmethod
    def backward(ctx, *grad_outputs):
        a_NV, gap_NV, rest_NV = _gap_and_rest(*ctx.saved_tensors)
        grad_N1 = grad_outputs[0][:, None]
        return grad_N1 * (a_NV * gap_NV), grad_N1 * rest_NV


def _gap_and_rest(log_a_NV: Tensor, log_b_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, log(a/b), b - a), the gap as 0 where a is FAINT; b - a keeps its digits where the two are close."""
    a_NV, gap_NV = log_a_NV.exp(), log_a_NV - log_b_NV
    faint_NV = a_NV < FAINT
    if not faint_NV.any():
        return a_NV, gap_NV, a_NV * gap_NV.neg().expm1_()
    # Selected before the products: 0 * -inf is NaN in the value and in the gradient, and b/a overflows.
    gap_NV = gap_NV.masked_fill_(faint_NV, 0.0)
    return a_NV, gap_NV, torch.where(faint_NV, log_b_NV.exp() - a_NV, a_NV * gap_NV.neg().expm1_())


def relative_entropy(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(a || b) [N] of two distributions; where a = 0 no more than b is added, which the others lack."""
    return _RelativeEntropy.apply(log_a_NV, log_b_NV)


def _on_support(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """The student's logits with -inf where the teacher's are."""
    return widened(student_NV).masked_fill(teacher_NV == -torch.inf, -torch.inf)


def _log_mixture(log_a_NV: Tensor, log_b_NV: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), 0 < share < 1."""
    dead_NV = (log_a_NV == -torch.inf) & (log_b_NV == -torch.inf)
    # The derivative of logaddexp(-inf, -inf) is NaN, and times 0 it stays NaN.
    a_NV, b_NV = log_a_NV.masked_fill(dead_NV, 0.0), log_b_NV.masked_fill(dead_NV, 0.0)
    return torch.logaddexp(a_NV + math.log(share), b_NV + math.log1p(-share)).masked_fill(dead_NV, -torch.inf)


def forward_kl_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """T^2 KL(p || q) (arXiv 1503.02531); gradient on s: T (q - p). Where p = 0 nothing is added, also if q is 0."""
    log_p_NV, log_q_NV = _log_softmax(teacher_NV, temperature), _log_softmax(student_NV, temperature)
    return _times_T(relative_entropy(log_p_NV, log_q_NV), temperature)


def reverse_kl_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """T^2 KL(q || p) (arXiv 2306.08543); gradient on s: T q (log(q/p) - KL)."""
    log_p_NV = _log_softmax(teacher_NV, temperature)
    log_q_NV = _log_softmax(_on_support(student_NV, teacher_NV), temperature)
    return _times_T(relative_entropy(log_q_NV, log_p_NV), temperature)


def jensen_shannon_rows(
    student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q (arXiv 2306.13649).

    It tends to 0 at both ends of beta, not to a KL: divided by beta (1 - beta) it would.
    """
    log_p_NV, log_q_NV = _log_softmax(teacher_NV, temperature), _log_softmax(student_NV, temperature)
    log_m_NV = _log_mixture(log_p_NV, log_q_NV, beta)
    value_N = beta * relative_entropy(log_p_NV, log_m_NV) + (1.0 - beta) * relative_entropy(log_q_NV, log_m_NV)
    return _times_T(value_N, temperature)


def skew_kl_rows(
    student_NV: Tensor,
    teacher_NV: Tensor,
    temperature: Tensor | float = 1.0,
    skew: float = 0.1,
    reverse: bool = False,
) -> Tensor:
    """T^2 KL(p || skew p + (1 - skew) q), or reversed T^2 KL(q || (1 - skew) p + skew q) (DistiLLM, arXiv 2402.03898).

    At most T^2 log(1 / skew). The gradient flows through q inside the mixture.
    """
    if skew == 0.0 and reverse:
        return reverse_kl_rows(student_NV, teacher_NV, temperature)
    log_p_NV, log_q_NV = _log_softmax(teacher_NV, temperature), _log_softmax(student_NV, temperature)
    one, other = (log_q_NV, log_p_NV) if reverse else (log_p_NV, log_q_NV)
    mixture_NV = _log_mixture(one, other, skew) if skew else other
    return _times_T(relative_entropy(one, mixture_NV), temperature)


def adaptive_kl_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """T^2 (g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), 0 where p = q (AKL, arXiv 2404.02657).

    With tokens in falling order of p, the tail is where the running sum of p is above 1/2, but never the first token;
    g_h and g_t are the sums of |p - q| over head and tail, and carry no gradient.
    """
    log_p_NV = _log_softmax(teacher_NV, temperature)
    log_q_NV = _log_softmax(_on_support(student_NV, teacher_NV), temperature)
    with torch.no_grad():
        p_NV, order_NV = log_p_NV.exp().sort(dim=-1, descending=True, stable=True)
        distance_NV = (p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
        tail_NV = p_NV.cumsum(-1) > 0.5
        tail_NV[:, 0] = False
        tail_N = (distance_NV * tail_NV).sum(-1)
        head_N = distance_NV.sum(-1) - tail_N
        total_N = (head_N + tail_N).clamp_min(torch.finfo(p_NV.dtype).tiny)
    forward_N, reverse_N = relative_entropy(log_p_NV, log_q_NV), relative_entropy(log_q_NV, log_p_NV)
    return _times_T((head_N * forward_N + tail_N * reverse_N) / total_N, temperature)


def total_variation_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """T/2 sum |p - q|, in [0, T]."""
    p_NV, q_NV = _log_softmax(teacher_NV, temperature).exp(), _log_softmax(student_NV, temperature).exp()
    return _times_T(0.5 * (p_NV - q_NV).abs().sum(-1), temperature, power=1)


def _bucket_kl_rows(
    student_NV: Tensor, kept_NK: Tensor, log_p_NK: Tensor, log_p_tail_N1: Tensor | None, temperature: Tensor | float
) -> Tensor:
    """T^2 KL over K tokens and one bucket for all others, from the teacher's tempered log-probabilities of both.

    sum_K p (log p - log q) + (1 - P_K) [log(1 - P_K) - log(1 - Q_K)], with q over the whole vocabulary. Without a tail
    the kept tokens are all there are.
    """
    log_q_NV = _log_softmax(student_NV, temperature)
    log_q_NK = log_q_NV.gather(-1, kept_NK)
    if log_p_tail_N1 is not None:
        log_q_tail_N1 = _log_complement(log_q_NV, kept_NK)
        log_p_NK, log_q_NK = torch.cat([log_p_NK, log_p_tail_N1], -1), torch.cat([log_q_NK, log_q_tail_N1], -1)
    return _times_T(relative_entropy(log_p_NK, log_q_NK), temperature)


def _log_complement(log_p_NV: Tensor, kept_NK: Tensor) -> Tensor:
    """Log of the mass beyond the kept tokens [N, 1], -inf without a gradient where there is none."""
    # A sum of the complement's own terms: 1 - P_K would lose it to rounding.
    rest_NV = log_p_NV.scatter(-1, kept_NK, -torch.inf)
    empty_N1 = (rest_NV == -torch.inf).all(-1, keepdim=True)
    # The derivative of logsumexp over nothing is NaN, and times 0 it stays NaN.
    return rest_NV.masked_fill(empty_N1, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty_N1, -torch.inf)


def tail_bucket_kl_rows(
    student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0, k: int = 256
) -> Tensor:
    """T^2 KL over the teacher's k best tokens and one bucket for all others.

    Tempered over the whole vocabulary first, then bucketed: the other order is another function. At most the full KL;
    equal to it where K covers the vocabulary.
    """
    log_p_NV = _log_softmax(teacher_NV, temperature)
    V = log_p_NV.shape[-1]
    kept_NK = log_p_NV.detach().topk(min(k, V), -1).indices
    tail_N1 = None if k >= V else _log_complement(log_p_NV, kept_NK)
    return _bucket_kl_rows(student_NV, kept_NK, log_p_NV.gather(-1, kept_NK), tail_N1, temperature)


def stored_bucket_kl_rows(
    student_NV: Tensor, kept_NK: Tensor, log_p_NK: Tensor, log_tail_NJ: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """:func:`tail_bucket_kl_rows` from what is stored of the teacher.

    At T its partition is log Z = logaddexp(logsumexp_K(log p / T), L(1/T)): tempering comes before the buckets
    here too.

    Args:
        kept_NK, log_p_NK: the k best tokens and their log-probabilities at T = 1.
        log_tail_NJ: the others' log-partition L at tail.NODES, see tail.py.
        temperature: as everywhere here, within tail.py's span.
    """
    dtype = wide_dtype(student_NV.dtype)
    banned_NK = log_p_NK == -torch.inf
    # As in _log_softmax: -inf never meets T.
    head_NK = log_p_NK.to(dtype).masked_fill(banned_NK, 0.0) / temperature
    head_NK = head_NK.masked_fill(banned_NK, -torch.inf)
    if kept_NK.shape[-1] == student_NV.shape[-1]:
        return _bucket_kl_rows(student_NV, kept_NK, head_NK.log_softmax(-1), None, temperature)
    tail_N1 = log_tail(log_tail_NJ.to(dtype), temperature)[:, None]
    log_z_N1 = torch.logaddexp(head_NK.logsumexp(-1, keepdim=True), tail_N1)
    return _bucket_kl_rows(student_NV, kept_NK, head_NK - log_z_N1, tail_N1 - log_z_N1, temperature)


def tcs_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0, k: int = 100) -> Tensor:
    """T^2 KL over the teacher's k best tokens, both sides renormalised on them. Biased.

    The gradient on every other token is exactly 0, so a student with the right ratios within the k best has loss 0
    however little mass it gives them; the sign of a kept token's gradient can be wrong too. See tail_bucket_kl_rows.
    """
    kept_NK = teacher_NV.detach().topk(min(k, teacher_NV.shape[-1]), -1).indices
    return forward_kl_rows(student_NV.gather(-1, kept_NK), teacher_NV.gather(-1, kept_NK), temperature)


def ce_rows(student_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy -log softmax(s)[target] at temperature 1; targets within the vocabulary."""
    return -F.log_softmax(widened(student_NV), -1).gather(-1, targets_N[:, None]).squeeze(-1)


FORMULAS = {
    "forward_kl": forward_kl_rows,
    "reverse_kl": reverse_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "skew_kl": skew_kl_rows,
    "adaptive_kl": adaptive_kl_rows,
    "total_variation": total_variation_rows,
    "tail_bucket_kl": tail_bucket_kl_rows,
    "tcs": tcs_rows,
}
"""Divergences between student and teacher by name; ce stands apart, since it takes targets."""

OPTIONS = {
    "jensen_shannon": ("beta",),
    "skew_kl": ("skew", "reverse"),
    "tail_bucket_kl": ("k",),
    "tcs": ("k",),
}
"""What a divergence takes beside logits and temperature."""

"""The value of each divergence for one row of logits: the only place where its formula stands.

Every function takes logits [N, V] (the teacher's may hold -inf), a temperature T (a number, a scalar tensor, or [N, 1])
and returns nats [N] in float32 or float64, T^2 included, differentiable in the student's logits and in all three
places of T. Shapes: N rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(logits_NV: Tensor) -> Tensor:
    # A sum over 50,000 terms in bfloat16 makes a small divergence negative.
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def _log_softmax(logits_NV: Tensor, temperature: Tensor | float) -> Tensor:
    logits_NV = _wide(logits_NV)
    banned_NV = logits_NV == -torch.inf
    # A banned token never meets T: the derivative of -inf / T is infinite, and times 0 it is NaN.
    return F.log_softmax((logits_NV.masked_fill(banned_NV, 0.0) / temperature).masked_fill(banned_NV, -torch.inf), -1)


def forward_kl_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """T^2 KL(p || q) with p = softmax(t/T), q = softmax(s/T) (arXiv 1503.02531); gradient on s: T (q - p).

    Entries with p = 0 add nothing, also where q is 0.
    """
    log_p_NV = _log_softmax(teacher_NV, temperature)
    log_q_NV = _log_softmax(student_NV, temperature)
    p_NV = log_p_NV.exp()
    alive_NV = p_NV > 0
    # Selected before the product: 0 * -inf is NaN in the value and in the gradient.
    gap_NV = torch.where(alive_NV, log_p_NV, 0.0) - torch.where(alive_NV, log_q_NV, 0.0)
    scale = torch.as_tensor(temperature, dtype=p_NV.dtype, device=p_NV.device) ** 2
    return (p_NV * gap_NV).sum(-1) * (scale.squeeze(-1) if scale.ndim else scale)


def ce_rows(student_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy -log softmax(s)[target] at temperature 1; a target outside the vocabulary, -100 too, raises."""
    return -F.log_softmax(_wide(student_NV), -1).gather(-1, targets_N[:, None]).squeeze(-1)

"""Losses between relations: how tokens, or sequences, of one model stand to each other, compared with the teacher's.

A student without attention matrices has no attention distributions to compare; its receptance, key and value stand for
query, key and value in the relations of projections, which need none.

Shapes: B sequences, L tokens, D channels, A relation heads, P pooled rows.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from asnn_goose.kernels.precision import widened
from asnn_goose.kernels.unit_length import unit_length


def _pairwise(states_PD: Tensor) -> Tensor:
    """Distances [P, P]; 0 on the diagonal, with a gradient of 0 there."""
    squares = (states_PD[:, None] - states_PD[None]).square().sum(-1)
    alike = squares == 0.0
    return torch.where(alike, 0.0, torch.where(alike, 1.0, squares).sqrt())


def _check_rows(student_PD: Tensor, teacher_PE: Tensor) -> None:
    if student_PD.shape[0] != teacher_PE.shape[0] or not student_PD.shape[0]:
        raise ValueError(
            f"pooled rows {tuple(student_PD.shape)} (student) and {tuple(teacher_PE.shape)} (teacher) must be one or "
            "more, as many on both sides"
        )


def rkd_distance(student_PD: Tensor, teacher_PE: Tensor) -> Tensor:
    """Huber loss of the rows' distances, each side divided by its own mean distance, mean over all pairs.

    (RKD-D, arXiv 1904.05068.) Needs two rows that differ; widths may differ.

    Raises:
        ValueError: not two matrices of as many rows.
    """
    _check_rows(student_PD, teacher_PE)
    scaled = []
    for states in map(widened, (student_PD, teacher_PE.detach())):
        distances = _pairwise(states)
        mean = distances[distances > 0].mean() if bool((distances > 0).any()) else distances.new_ones(())
        scaled.append(distances / mean)
    return F.smooth_l1_loss(scaled[0], scaled[1])


def rkd_angle(student_PD: Tensor, teacher_PE: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles at every row between every two others, mean over triples.

    (RKD-A, arXiv 1904.05068.)

    Raises:
        ValueError: not two matrices of as many rows.
    """
    _check_rows(student_PD, teacher_PE)
    cosines = []
    for states in map(widened, (student_PD, teacher_PE.detach())):
        directions = unit_length(states[None] - states[:, None])
        with torch.autocast(directions.device.type, enabled=False):
            cosines.append(directions @ directions.mT)
    return F.smooth_l1_loss(cosines[0], cosines[1])


def info_nce(student_PD: Tensor, teacher_PD: Tensor, temperature: float = 0.1) -> Tensor:
    """-log softmax_j(cos(s_i, t_j) / tau)[i], mean over rows: a pooled state finds its own teacher among the batch's.

    (CRD in its InfoNCE form, arXiv 1910.10699.)

    Raises:
        ValueError: fewer than two rows, or unequal shapes.
    """
    if student_PD.shape != teacher_PD.shape or student_PD.shape[0] < 2:
        raise ValueError(
            f"the contrastive term needs two or more rows of equal shape, not {tuple(student_PD.shape)} and "
            f"{tuple(teacher_PD.shape)}"
        )
    with torch.autocast(student_PD.device.type, enabled=False):
        scores = unit_length(widened(student_PD)) @ unit_length(widened(teacher_PD.detach())).T
    return F.cross_entropy(scores / temperature, torch.arange(len(scores), device=scores.device))


def relation_kl(
    student_BLD: Tensor, teacher_BLE: Tensor, heads: int, mask_BL: Tensor | None = None, block: int | None = None
) -> Tensor:
    """KL between softmax(X X^T / sqrt(d)) of teacher and student, in nats, mean over relation heads and unmasked rows.

    Concatenated projections are split into ``heads`` relation heads of width d = D / heads, so that widths and numbers
    of attention heads may differ (MiniLMv2, arXiv 2012.15828; with one projection, the values, and as many heads as the
    teacher has, MiniLM's value relation, arXiv 2002.10957). Padding is out of rows and columns.

    Args:
        student_BLD, teacher_BLE: the same projection of both models, computed in float32 at least.
        heads: A; divides both widths.
        mask_BL: true where a token counts.
        block: tokens are related within blocks of so many only; None: within the whole sequence.

    Raises:
        ValueError: heads or block that do not fit.
    """
    B, L = student_BLD.shape[:2]
    if teacher_BLE.shape[:2] != (B, L):
        raise ValueError(f"projections of {(B, L)} and {tuple(teacher_BLE.shape[:2])} tokens cannot be related")
    for width in (student_BLD.shape[-1], teacher_BLE.shape[-1]):
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} relation heads do not divide the width {width}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1 token, not {block}")
    counts_BL = torch.ones(B, L, dtype=torch.bool, device=student_BLD.device) if mask_BL is None else mask_BL.bool()
    size = L if block is None else min(block, L)
    pad = -L % size
    mask = rearrange(F.pad(counts_BL, (0, pad)), "b (n l) -> (b n) 1 l", l=size)

    def log_relation(states: Tensor) -> Tensor:
        # Padding may hold NaN, which a product would carry into the gradients of all others.
        states = F.pad(widened(states).masked_fill(~counts_BL[..., None], 0.0), (0, 0, 0, pad))
        split = rearrange(states, "b (n l) (a d) -> (b n) a l d", l=size, a=heads)
        with torch.autocast(states.device.type, enabled=False):
            scores = split @ split.mT / split.shape[-1] ** 0.5
        return torch.log_softmax(scores.masked_fill(~mask[:, :, None], -torch.inf), -1)

    student, teacher = log_relation(student_BLD), log_relation(teacher_BLE.detach())
    p = teacher.exp()
    alive = (p != 0.0) & mask[..., None]
    # Selected before the product: 0 * -inf is NaN in the value and in the gradient.
    gap = torch.where(alive, teacher, 0.0) - torch.where(alive, student, 0.0)
    rows = (torch.where(alive, p, 0.0) * gap).sum(-1)
    return rows.sum() / (heads * mask.sum().clamp_min(1))


def minilmv2(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    heads: int,
    mask_BL: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Sum over the projections (query, key, value) of :func:`relation_kl` (MiniLMv2; BitDistill, arXiv 2510.13998).

    The student's receptance stands under "query". The published coefficients fit other reductions: choose the weight by
    the ratio of gradient norms.

    Raises:
        ValueError: other names on one side than on the other, none, or as for :func:`relation_kl`.
    """
    if set(student) != set(teacher) or not student:
        raise ValueError(f"the projections {sorted(student)} and {sorted(teacher)} must have the same names")
    terms = [relation_kl(student[name], teacher[name], heads, mask_BL, block) for name in student]
    return torch.stack(terms).sum()

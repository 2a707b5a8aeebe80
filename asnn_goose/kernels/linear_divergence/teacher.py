"""A teacher as linear_divergence takes it: its states and head, or what is stored of its distribution.

Shapes: N rows, E teacher channels, V vocabulary, K kept tokens, J nodes of tail.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import rows, tail


class DenseTeacher(NamedTuple):
    hidden_NE: Tensor
    weight_VE: Tensor

    def select(self, which: Tensor | slice) -> "DenseTeacher":
        """Some of its rows."""
        return DenseTeacher(self.hidden_NE[which], self.weight_VE)


class SparseTeacher(NamedTuple):
    ids_NK: Tensor
    """The k best tokens of each row, no two alike."""
    log_p_NK: Tensor
    """Their log-probabilities at T = 1."""
    log_tail_NJ: Tensor
    """The tail's log-partition at tail.NODES."""

    def select(self, which: Tensor | slice) -> "SparseTeacher":
        """Some of its rows."""
        return SparseTeacher(*(stored[which] for stored in self))


Teacher = DenseTeacher | SparseTeacher

Known = Tensor | SparseTeacher | None
"""What a divergence sees of a teacher: its logits, or what is stored of it; None where only ce is asked for."""

SERVED_BY_SPARSE = ("ce", "tail_bucket_kl")
"""What can be computed from a SparseTeacher."""


def dense_teacher(hidden_NE: Tensor, weight_VE: Tensor, N: int, V: int) -> DenseTeacher:
    """The checked arguments teacher_hidden_NE and teacher_weight_VE."""
    if weight_VE.shape[0] != V:
        raise ValueError(f"heads of {V} and {weight_VE.shape[0]} tokens cannot be compared")
    if hidden_NE.ndim != 2 or hidden_NE.shape[0] != N:
        raise ValueError(f"teacher hidden must be a matrix of {N} rows, as hidden is, not {tuple(hidden_NE.shape)}")
    if hidden_NE.shape[1:] != weight_VE.shape[1:]:
        raise ValueError(f"teacher hidden has {hidden_NE.shape[1]} channels, and its head {tuple(weight_VE.shape)[1:]}")
    return DenseTeacher(hidden_NE, weight_VE)


def sparse_teacher(parts: tuple[Tensor, Tensor, Tensor], N: int, names: tuple[str, ...], options) -> SparseTeacher:
    """The checked argument teacher_topk.

    Raises:
        ValueError: shapes, dtypes or names that do not fit, or an option k that is not the stored one.
    """
    teacher = SparseTeacher(*parts)
    ids_NK, log_p_NK, log_tail_NJ = teacher
    others = [name for name in names if name not in SERVED_BY_SPARSE]
    if others:
        raise ValueError(
            f"teacher_topk serves {' and '.join(SERVED_BY_SPARSE)}, not {', '.join(others)}: give the teacher's "
            "states and head for it"
        )
    if ids_NK.ndim != 2 or ids_NK.shape[0] != N or ids_NK.dtype != torch.int64 or log_p_NK.shape != ids_NK.shape:
        raise ValueError(
            f"teacher_topk must hold int64 ids and log-probabilities of one shape ({N}, K), not {ids_NK.dtype} "
            f"{tuple(ids_NK.shape)} and {tuple(log_p_NK.shape)}"
        )
    if log_tail_NJ.shape != (N, len(tail.NODES)):
        raise ValueError(
            f"teacher_topk must hold the tail's log-partition at the {len(tail.NODES)} nodes for each of {N} rows, not "
            f"{tuple(log_tail_NJ.shape)}"
        )
    K = ids_NK.shape[1]
    asked = options.get("tail_bucket_kl", {}).get("k", K)
    if asked != K:
        raise ValueError(
            f"tail_bucket_kl.k is {asked}, but teacher_topk holds {K} tokens per row: leave k out, or store {asked}"
        )
    return teacher


def divergence_rows(
    name: str, student_NV: Tensor, teacher: Known, targets_N: Tensor | None, temperature: Tensor | float, options
) -> Tensor:
    """The named divergence of each row [N]."""
    if name == "ce":
        assert targets_N is not None
        return rows.ce_rows(student_NV, targets_N)
    if isinstance(teacher, SparseTeacher):
        return rows.stored_bucket_kl_rows(student_NV, *teacher, temperature)
    assert teacher is not None
    return rows.FORMULAS[name](student_NV, teacher, temperature, **options.get(name, {}))

"""Heads and divergences with all logits at once, by autograd: the plain form that the tiled one is checked against."""

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence.teacher import DenseTeacher, Teacher, divergence_rows
from asnn_goose.kernels.precision import wide_dtype


def sums_reference(hidden_ND, weight_VD, temperature, teacher: Teacher, targets_N, names, options) -> Tensor:
    """Sum over rows of each named divergence, [len(names)]; ``temperature`` is a scalar or [N]."""
    # A tensor with a dimension, other than a scalar, would widen the logits that it divides.
    wide = wide_dtype(weight_VD.dtype)
    temperature = temperature.to(wide)[:, None] if temperature.ndim else temperature
    # The head's dtype is the dtype of the products, also under autocast.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        student_NV = hidden_ND.to(weight_VD.dtype) @ weight_VD.T
        if isinstance(teacher, DenseTeacher):
            known = (teacher.hidden_NE.to(teacher.weight_VE.dtype) @ teacher.weight_VE.T).detach()
        else:
            known = teacher
        sums = [divergence_rows(name, student_NV, known, targets_N, temperature, options).sum() for name in names]
    return torch.stack(sums)

"""Heads and divergences with all logits at once, by autograd: the plain form that the tiled one is checked against."""

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence.rows import FORMULAS, ce_rows


def sums_reference(
    hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, targets_N, names, temperature, options
) -> Tensor:
    """Sum over rows of each named divergence, [len(names)]."""
    sums = []
    # The head's dtype is the dtype of the products, also under autocast.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        student_NV = hidden_ND.to(weight_VD.dtype) @ weight_VD.T
        for name in names:
            if name == "ce":
                sums.append(ce_rows(student_NV, targets_N).sum())
            else:
                teacher_NV = teacher_hidden_NE.to(teacher_weight_VE.dtype) @ teacher_weight_VE.T
                formula = FORMULAS[name]
                rows_N = formula(student_NV, teacher_NV.detach(), temperature, **options.get(name, {}))
                sums.append(rows_N.sum())
    return torch.stack(sums)

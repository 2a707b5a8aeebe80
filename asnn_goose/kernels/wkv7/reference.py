"""The WKV-7 recurrence, one token at a time: the plain form that the others are checked against.

Shapes: B batch, L tokens, H heads, D channels of a head; state_BHVK has value rows and key columns.
"""

import torch
from torch import Tensor


def wkv7_step(r_BHD, log_w_BHD, k_BHD, v_BHD, a_BHD, b_BHD, state_BHVK) -> tuple[Tensor, Tensor]:
    """One token: S <- S (diag(exp(log_w)) + a b^T) + v k^T, y = S r; a and b both None: without a b^T."""
    written_BHVK = v_BHD[..., None] * k_BHD[:, :, None, :]
    if a_BHD is not None:
        read_BHV = torch.einsum("bhvk,bhk->bhv", state_BHVK, a_BHD)
        written_BHVK = written_BHVK + read_BHV[..., None] * b_BHD[:, :, None, :]
    state_BHVK = state_BHVK * log_w_BHD.exp()[:, :, None, :] + written_BHVK
    return torch.einsum("bhvk,bhk->bhv", state_BHVK, r_BHD), state_BHVK


def wkv7_reference(r_BLHD, log_w_BLHD, k_BLHD, v_BLHD, a_BLHD, b_BLHD, state_BHVK) -> tuple[Tensor, Tensor]:
    """All tokens in order; unbind instead of indexing keeps the backward pass linear in L."""
    outputs = []
    L = r_BLHD.shape[1]
    tokens = ([None] * L if x is None else x.unbind(1) for x in (r_BLHD, log_w_BLHD, k_BLHD, v_BLHD, a_BLHD, b_BLHD))
    for r, log_w, k, v, a, b in zip(*tokens, strict=True):
        y_BHV, state_BHVK = wkv7_step(r, log_w, k, v, a, b, state_BHVK)
        outputs.append(y_BHV)
    return torch.stack(outputs, 1), state_BHVK

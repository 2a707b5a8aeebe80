"""Student head, teacher head and the divergences between their logits in one op that never holds all logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asnn_goose.kernels.backend import HALF, Backend, choose, log_choice
from asnn_goose.kernels.linear_divergence.reference import sums_reference
from asnn_goose.kernels.linear_divergence.rows import FORMULAS, ce_rows, forward_kl_rows
from asnn_goose.kernels.linear_divergence.tiled import CLOSED_FORM, TiledSums

__all__ = ["DIVERGENCES", "ce_rows", "forward_kl_rows", "linear_divergence"]

DIVERGENCES = ("ce", *FORMULAS)


def _native_cannot(*, names, **_) -> str | None:
    return None if set(names) <= CLOSED_FORM else f"knows ce and forward_kl, not {sorted(set(names) - CLOSED_FORM)}"


BACKENDS = (
    Backend("native", ("cpu",), (*HALF, torch.float32), package="numba", unless=_native_cannot),
    Backend("tiled"),
    Backend("reference", automatic=False),
)


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    targets_N: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[dict[str, Tensor], int]:
    """Sums over valid rows of each divergence between softmax(h W^T) and softmax(h_t W_t^T), and the number of rows.

    Args:
        hidden_ND: student states in front of its head, N rows.
        weight_VD: student head; its dtype is the dtype of the products.
        teacher_hidden_NE, teacher_weight_VE: the same for the teacher; never receive gradient.
        targets_N: token ids, for ``ce``.
        weights: name -> factor with which the caller will add the sums up; names among DIVERGENCES. The tiled forms
            prepare the gradient of exactly this mixture (or a multiple of it) and refuse any other.
        options: name -> what its formula takes beside logits and temperature (beta, skew, reverse, k; see rows.py).
        temperature: T of the divergences (not of ce), a number or a scalar tensor that receives its gradient.
        mask: [N] bool, rows that count; None: all.
        backend: native (tiled, numba; ce and forward_kl on the CPU, a head of float32 or narrower), tiled (torch),
            reference (all logits at once), or auto: native where it runs, else tiled.

    Returns:
        ({name: scalar sum in nats, T^2 included, float64 for a float64 head, else float32}, number of valid rows).
    """
    weights = {"forward_kl": 1.0} if weights is None else dict(weights)
    unknown = sorted(set(weights) - set(DIVERGENCES))
    if unknown or not weights:
        raise ValueError(f"weights must name some of {DIVERGENCES}, not {unknown}")
    options = {} if options is None else options
    if set(options) - set(weights):
        raise ValueError(f"options name {sorted(set(options) - set(weights))}, which have no weight")
    if "ce" in weights and targets_N is None:
        raise ValueError("the divergence ce needs targets_N")
    if weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(f"heads of {weight_VD.shape[0]} and {teacher_weight_VE.shape[0]} tokens cannot be compared")
    N = hidden_ND.shape[0]
    if hidden_ND.ndim != 2 or teacher_hidden_NE.ndim != 2 or teacher_hidden_NE.shape[0] != N:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)} and teacher hidden {tuple(teacher_hidden_NE.shape)} must be matrices of "
            "the same rows"
        )
    if targets_N is not None and targets_N.shape != (N,):
        raise ValueError(f"targets must be one token id for each of {N} rows, not {tuple(targets_N.shape)}")
    if mask is not None and (mask.shape != (N,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be one bool for each of {N} rows, not {tuple(mask.shape)} of {mask.dtype}")
    temperature = torch.as_tensor(temperature)
    if temperature.ndim or not temperature.detach() > 0:
        raise ValueError(f"temperature must be one number above 0, not {temperature.tolist()}")
    if mask is not None:
        hidden_ND, teacher_hidden_NE = hidden_ND[mask], teacher_hidden_NE[mask]
        targets_N = None if targets_N is None else targets_N[mask]
    names = tuple(weights)
    choice = choose("linear_divergence", BACKENDS, backend, device=weight_VD.device, dtype=weight_VD.dtype, names=names)
    log_choice("linear_divergence", choice)
    if choice == "reference":
        sums = sums_reference(
            hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, targets_N, names, temperature, options
        )
    else:
        sums = TiledSums.apply(
            hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, targets_N, options, weights, temperature, choice
        )
    return dict(zip(names, sums.unbind(), strict=True)), hidden_ND.shape[0]

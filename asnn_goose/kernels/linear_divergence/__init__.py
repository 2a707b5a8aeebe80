"""Student head, teacher head and the divergences between their logits in one op that never holds all logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asnn_goose.kernels.backend import HALF, Backend, choose, log_choice
from asnn_goose.kernels.linear_divergence.reference import sums_reference
from asnn_goose.kernels.linear_divergence.rows import (
    FORMULAS,
    ce_rows,
    check_ids,
    check_options,
    check_temperature,
    forward_kl_rows,
)
from asnn_goose.kernels.linear_divergence.teacher import dense_teacher, sparse_teacher
from asnn_goose.kernels.linear_divergence.tiled import TiledSums
from asnn_goose.kernels.linear_divergence.tiles import CLOSED_FORM

__all__ = ["DIVERGENCES", "ce_rows", "forward_kl_rows", "linear_divergence"]

DIVERGENCES = ("ce", *FORMULAS)


def _other_terms(*, names) -> str | None:
    return None if set(names) <= CLOSED_FORM else f"knows ce and forward_kl, not {sorted(set(names) - CLOSED_FORM)}"


BACKENDS = (
    Backend("native", ("cpu",), (*HALF, torch.float32), package="numba", unless=_other_terms),
    Backend("triton", ("cuda",), (*HALF, torch.float32), package="triton", unless=_other_terms),
    Backend("tiled"),
    Backend("reference", automatic=False),
)


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_NE: Tensor | None = None,
    teacher_weight_VE: Tensor | None = None,
    *,
    teacher_topk: tuple[Tensor, Tensor, Tensor] | None = None,
    targets_N: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[dict[str, Tensor], int]:
    """Sums over valid rows of each divergence between softmax(h W^T) and the teacher's softmax, and the number of rows.

    Beside inputs and gradients, the tiled forms hold BUDGET of tiles.py (64 MiB, or a quarter of the student's head
    where that is more) and copies of the rows that ``mask`` selects; heads of 16 bits add one product of the head's
    size in 16 bits when it is trained. The reference holds all logits several times.

    Args:
        hidden_ND: student states in front of its head, N rows.
        weight_VD: student head; its dtype is the dtype of the products.
        teacher_hidden_NE, teacher_weight_VE: the same for the teacher; never receive gradient.
        teacher_topk: in their place, what is stored of the teacher: (ids [N, K] int64 of its k best tokens, their
            log-probabilities [N, K] at T = 1, the other tokens' log-partition [N, J] at tail.NODES). Serves ce and
            tail_bucket_kl, at temperatures that tail.py spans.
        targets_N: token ids, for ``ce``.
        weights: name -> factor with which the caller will add the sums up; names among DIVERGENCES. The tiled forms
            prepare the gradient of exactly this mixture (or a multiple of it); any other takes a second pass.
        options: name -> what its formula takes beside logits and temperature (beta, skew, reverse, k; see rows.py).
        temperature: T of the divergences (not of ce): a number, or a tensor, scalar or one T for each row [N], that
            receives its gradient.
        mask: [N], true where a row counts; None: all.
        backend: native (tiled, numba; CPU, a head of float32 or narrower), triton (tiled; CUDA, likewise), both for ce
            and forward_kl; tiled (torch, anything), reference (all logits at once), or auto: the first that can run.

    Returns:
        ({name: scalar sum in nats, T^2 included, float64 for a float64 head, else float32}, number of valid rows).

    Raises:
        ValueError: arguments that do not fit together, a token id outside the vocabulary, or a named backend that
            cannot run them.
    """
    weights = {"forward_kl": 1.0} if weights is None else dict(weights)
    options = {} if options is None else options
    temperature = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    temperature = temperature.reshape(()) if temperature.numel() == 1 else temperature
    N, V = hidden_ND.shape[0], weight_VD.shape[0]
    mask = None if mask is None else mask.bool()
    _check(hidden_ND, weight_VD, targets_N, weights, options, temperature, mask)
    names = tuple(weights)
    if teacher_topk is not None and teacher_hidden_NE is None and teacher_weight_VE is None:
        teacher = sparse_teacher(teacher_topk, N, names, options)
    elif teacher_topk is None and teacher_hidden_NE is not None and teacher_weight_VE is not None:
        teacher = dense_teacher(teacher_hidden_NE, teacher_weight_VE, N, V)
    else:
        raise ValueError("give the teacher either as teacher_hidden_NE with teacher_weight_VE, or as teacher_topk")
    if mask is not None:
        hidden_ND, teacher = hidden_ND[mask], teacher.select(mask)
        targets_N = None if targets_N is None else targets_N[mask]
        temperature = temperature[mask] if temperature.ndim else temperature
    if "ce" in weights and targets_N is not None:
        check_ids("targets_N holds", targets_N, V)
    if teacher_topk is not None:
        check_ids("teacher_topk holds", teacher[0], V)
    choice = choose("linear_divergence", BACKENDS, backend, device=weight_VD.device, dtype=weight_VD.dtype, names=names)
    log_choice("linear_divergence", choice)
    if choice == "reference":
        sums = sums_reference(hidden_ND, weight_VD, temperature, teacher, targets_N, names, options)
    else:
        sums = TiledSums.apply(hidden_ND, weight_VD, temperature, teacher, targets_N, weights, options, choice)
    return dict(zip(names, sums.unbind(), strict=True)), hidden_ND.shape[0]  # pyright: ignore[reportAttributeAccessIssue]


def _check(hidden_ND, weight_VD, targets_N, weights, options, temperature, mask) -> None:
    unknown = sorted(set(weights) - set(DIVERGENCES))
    if unknown or not weights:
        raise ValueError(f"weights must name some of {DIVERGENCES}, not {unknown}")
    if set(options) - set(weights):
        raise ValueError(f"options name {sorted(set(options) - set(weights))}, which have no weight")
    for name, given in options.items():
        check_options(name, given)
    if "ce" in weights and targets_N is None:
        raise ValueError("the divergence ce needs targets_N")
    N = hidden_ND.shape[0]
    if hidden_ND.ndim != 2:
        raise ValueError(f"hidden must be a matrix of one state per row, not {tuple(hidden_ND.shape)}")
    if hidden_ND.shape[1:] != weight_VD.shape[1:]:
        raise ValueError(f"hidden has {hidden_ND.shape[1]} channels, and the head {tuple(weight_VD.shape)[1:]}")
    if targets_N is not None and (targets_N.shape != (N,) or targets_N.is_floating_point()):
        raise ValueError(
            f"targets must be one token id for each of {N} rows, not {tuple(targets_N.shape)} of {targets_N.dtype}"
        )
    if mask is not None and mask.shape != (N,):
        raise ValueError(f"mask must have one value for each of {N} rows, not {tuple(mask.shape)}")
    if temperature.shape not in ((), (N,)):
        raise ValueError(f"temperature must be one number, or one for each of {N} rows, not {tuple(temperature.shape)}")
    check_temperature(temperature)

"""What one tile of logits contributes: sums, slopes in T and gradient, in buffers that serve every tile.

A tile takes at most BUDGET bytes, or a SHARE of the head's where that is more: with fewer rows the products would wait
for the head's weights, which each tile reads anew.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence.teacher import Known, SparseTeacher, divergence_rows

TILE = 256
"""Rows per tile where the budget allows more."""

BUDGET = 64 * 2**20
SHARE = 0.25

CLOSED_FORM = {"ce", "forward_kl"}
"""What the compiled tiles know; other mixtures go through autograd."""

WORKING = 17
"""Arrays as large as the logits that autograd holds at once for the largest formula, and the sum of gradients."""


class Mixture(NamedTuple):
    """What is asked of a tile."""

    weights: Mapping[str, float]
    options: Mapping[str, Mapping[str, Any]]
    wants_slope: bool


class Shape(NamedTuple):
    N: int
    V: int
    budget: int
    """Bytes."""


def shape_of(N: int, weight_VD: Tensor) -> Shape:
    return Shape(N, weight_VD.shape[0], max(BUDGET, int(SHARE * weight_VD.nbytes)))


def _fitting_rows(shape: Shape, bytes_per_logit: float, most: int) -> int:
    return max(1, min(most, shape.N, int(shape.budget / (bytes_per_logit * shape.V))))


class AutogradTile:
    """Any mixture in any dtype on any device: the formulas by autograd, over few rows of the tile at a time."""

    def __init__(self, shape: Shape, like: Tensor, mixture: Mixture):
        self.mixture = mixture
        # Three quarters for the logits, a quarter for autograd.
        self.rows = _fitting_rows(shape, 2 * like.itemsize / 0.75, TILE)
        self.inner = _fitting_rows(shape, WORKING * like.itemsize / 0.25, self.rows)
        self.s_NV, self.t_NV = (like.new_empty(self.rows, shape.V) for _ in range(2))

    def __call__(self, s_NV: Tensor, teacher: Known, targets_N: Tensor | None, T_N: Tensor) -> tuple[Tensor, Tensor]:
        """(each sum, slope in T of each row's weighted sum [N]) in float64; overwrites s_NV with its gradient."""
        sums = s_NV.new_zeros(len(self.mixture.weights), dtype=torch.float64)
        slopes_N = torch.zeros_like(T_N)
        for start in range(0, s_NV.shape[0], self.inner):
            rows = slice(start, start + self.inner)
            if isinstance(teacher, SparseTeacher):
                few = teacher.select(rows)
            else:
                few = None if teacher is None else teacher[rows]
            few_targets = None if targets_N is None else targets_N[rows]
            sums += self._few(s_NV[rows], few, few_targets, T_N[rows], slopes_N[rows])
        return sums, slopes_N

    def _few(self, s_NV: Tensor, teacher: Known, targets_N: Tensor | None, T_N: Tensor, slopes_N: Tensor) -> Tensor:
        weights, options, wants_slope = self.mixture
        grad_NV = torch.zeros_like(s_NV)
        sums = []
        # One term after the other, so that only one keeps what its gradient needs.
        for name, weight in weights.items():
            with torch.enable_grad():
                leaf = s_NV.detach().requires_grad_()
                T_N1 = T_N.to(s_NV.dtype)[:, None].requires_grad_(wants_slope)
                value = divergence_rows(name, leaf, teacher, targets_N, T_N1, options).sum()
            wanted = [leaf, T_N1] if wants_slope else [leaf]
            grad, *slopes = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            grad_NV.add_(grad, alpha=weight)
            sums.append(value.detach())
            if slopes:
                slopes_N.add_(slopes[0].squeeze(-1), alpha=weight)
        s_NV.copy_(grad_NV)
        return torch.stack(sums).double()


class CompiledTile:
    """ce and forward_kl in one of the compiled forms, native.py or triton.py, on float32 logits."""

    def __init__(self, shape: Shape, like: Tensor, mixture: Mixture, form: ModuleType):
        self.mixture, self.form = mixture, form
        self.rows = _fitting_rows(shape, 2 * like.itemsize, TILE)
        self.s_NV, self.t_NV = (like.new_empty(self.rows, shape.V) for _ in range(2))

    def __call__(self, s_NV: Tensor, teacher: Known, targets_N: Tensor | None, T_N: Tensor) -> tuple[Tensor, Tensor]:
        """As AutogradTile."""
        weights, _, wants_slope = self.mixture
        w_ce, w_kl = weights.get("ce"), weights.get("forward_kl")
        ce_N, kl_N, slopes_N = self.form.tile(s_NV, teacher, targets_N, T_N, w_ce, w_kl, wants_slope)
        rows = {"ce": ce_N, "forward_kl": kl_N}
        return torch.stack([rows[name].sum() for name in weights]), (w_kl or 0.0) * slopes_N


def tile_of(backend: str, shape: Shape, like: Tensor, mixture: Mixture) -> AutogradTile | CompiledTile:
    """The tile of a backend; ``like`` has the logits' dtype and device."""
    if backend == "native":
        from asnn_goose.kernels.linear_divergence import native

        return CompiledTile(shape, like, mixture, native)
    if backend == "triton":
        from asnn_goose.kernels.linear_divergence import triton

        return CompiledTile(shape, like, mixture, triton)
    return AutogradTile(shape, like, mixture)

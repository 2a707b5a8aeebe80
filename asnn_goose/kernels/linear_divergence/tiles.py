"""What one tile of logits contributes: sums, slope in T and gradient, in buffers that serve every tile.

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
    T: float
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

    def __call__(self, s_NV: Tensor, teacher: Known, targets_N: Tensor | None) -> Tensor:
        """[each sum, slope in T of their weighted sum] in float64; overwrites s_NV with its gradient."""
        results = s_NV.new_zeros(len(self.mixture.weights) + 1, dtype=torch.float64)
        for start in range(0, s_NV.shape[0], self.inner):
            rows = slice(start, start + self.inner)
            if isinstance(teacher, SparseTeacher):
                few = teacher.select(rows)
            else:
                few = None if teacher is None else teacher[rows]
            results += self._few(s_NV[rows], few, None if targets_N is None else targets_N[rows])
        return results

    def _few(self, s_NV: Tensor, teacher: Known, targets_N: Tensor | None) -> Tensor:
        weights, options, T, wants_slope = self.mixture
        grad_NV = torch.zeros_like(s_NV)
        results = []
        slope = s_NV.new_zeros(())
        # One term after the other, so that only one keeps what its gradient needs.
        for name, weight in weights.items():
            with torch.enable_grad():
                leaf = s_NV.detach().requires_grad_()
                temperature = torch.tensor(T, dtype=s_NV.dtype, device=s_NV.device, requires_grad=wants_slope)
                value = divergence_rows(name, leaf, teacher, targets_N, temperature, options).sum()
            wanted = [leaf, temperature] if wants_slope else [leaf]
            grad, *slopes = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            grad_NV.add_(grad, alpha=weight)
            results.append(value.detach())
            slope = slope + weight * slopes[0] if slopes else slope
        s_NV.copy_(grad_NV)
        return torch.stack([*results, slope]).double()


class CompiledTile:
    """ce and forward_kl in one of the compiled forms, native.py or triton.py, on float32 logits."""

    def __init__(self, shape: Shape, like: Tensor, mixture: Mixture, form: ModuleType):
        self.mixture, self.form = mixture, form
        self.rows = _fitting_rows(shape, 2 * like.itemsize, TILE)
        self.s_NV, self.t_NV = (like.new_empty(self.rows, shape.V) for _ in range(2))

    def __call__(self, s_NV: Tensor, teacher: Known, targets_N: Tensor | None) -> Tensor:
        """As AutogradTile."""
        weights, _, T, wants_slope = self.mixture
        w_ce, w_kl = weights.get("ce"), weights.get("forward_kl")
        ce, kl, slope = self.form.tile(s_NV, teacher, targets_N, w_ce, w_kl, T, wants_slope)
        sums = {"ce": ce, "forward_kl": kl}
        return torch.stack([*(sums[name] for name in weights), (w_kl or 0.0) * slope])


def tile_of(backend: str, shape: Shape, like: Tensor, mixture: Mixture) -> AutogradTile | CompiledTile:
    """The tile of a backend; ``like`` has the logits' dtype and device."""
    if backend == "native":
        from asnn_goose.kernels.linear_divergence import native

        return CompiledTile(shape, like, mixture, native)
    if backend == "triton":
        from asnn_goose.kernels.linear_divergence import triton

        return CompiledTile(shape, like, mixture, triton)
    return AutogradTile(shape, like, mixture)

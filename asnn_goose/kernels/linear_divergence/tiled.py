"""Heads and divergences one tile of rows at a time, with the gradients computed in the forward pass.

A tile's logits of both models lie in two buffers that serve every tile. The gradient of the weighted sum takes the
place of the student's logits and is multiplied with the head at once, so that only [N, D] leaves the tile, and the
head's gradient is added up in place. For ce and forward_kl it is known in closed form,

    d/ds [w_ce CE + w_kl T^2 KL(p || q)] = w_ce (softmax(s) - onehot) + w_kl T (q - p)
    d/dT [T^2 KL] = 2 T KL - Cov_p(t, log p - log q) + E_p[s] - E_q[s]

Shapes: N rows, D student channels, E teacher channels, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence.teacher import SparseTeacher, Teacher
from asnn_goose.kernels.linear_divergence.tiles import Mixture, shape_of, tile_of
from asnn_goose.kernels.once import differentiable_once
from asnn_goose.kernels.precision import wide_dtype


class Prepared(NamedTuple):
    """Gradients of the weighted sum, in float64 for a float64 head, else float32; None where not wanted."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    temperature_N: Tensor
    """Of each row, also where all share one temperature."""


class TiledSums(torch.autograd.Function):
    """Sums over rows [len(weights)].

    Forward prepares the gradient of the weighted sum; backward hands it over without a copy where it is asked for a
    multiple of these weights, and else, or for a second time, goes through the tiles again.
    """

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, temperature, teacher: Teacher, targets_N, weights, options, backend: str
    ):  # fmt: skip
        mixture = ctx.mixture = Mixture(weights, options, ctx.needs_input_grad[2])
        ctx.teacher, ctx.targets_N, ctx.backend = teacher, targets_N, backend
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.save_for_backward(hidden_ND, weight_VD, temperature)
        sums, ctx.prepared = _prepare(ctx, mixture, hidden_ND, weight_VD, temperature)
        return sums

    @staticmethod
    @differentiable_once
    def backward(ctx, *grad_outputs):
        (grad_sums,) = grad_outputs
        weights = torch.tensor(list(ctx.mixture.weights.values()), dtype=grad_sums.dtype, device=grad_sums.device)
        used = weights != 0
        scale = (grad_sums[used] / weights[used]).mean() if used.any() else grad_sums.new_zeros(())
        prepared, mixture = ctx.prepared, ctx.mixture
        # Rounding alone, of weights multiplied in float32, must not cost a second pass.
        if not torch.allclose(grad_sums, scale * weights, rtol=1e-5, atol=0.0):
            asked = dict(zip(mixture.weights, grad_sums.tolist(), strict=True))
            prepared, mixture, scale = None, mixture._replace(weights=asked), torch.ones_like(scale)
        prepared = prepared or _prepare(ctx, mixture, *ctx.saved_tensors)[1]
        ctx.prepared, temperature = None, ctx.saved_tensors[2]
        grads = [
            None if grad is None else grad.mul_(scale).to(dtype)
            for grad, dtype in zip((prepared.hidden_ND, prepared.weight_VD), ctx.dtypes, strict=True)
        ]
        wants_temperature = ctx.needs_input_grad[2] and tuple(ctx.mixture.weights) != ("ce",)
        grad_T = None
        if wants_temperature:
            slopes_N = scale * prepared.temperature_N
            grad_T = (slopes_N if temperature.ndim else slopes_N.sum()).to(temperature)
        return *grads, grad_T, None, None, None, None, None


def _prepare(
    ctx, mixture: Mixture, hidden_ND: Tensor, weight_VD: Tensor, temperature: Tensor
) -> tuple[Tensor, Prepared]:
    """(sums, gradients of their weighted sum), tile by tile."""
    N, teacher = hidden_ND.shape[0], ctx.teacher
    wide = wide_dtype(weight_VD.dtype)
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    grad_hidden_ND = torch.empty_like(hidden_ND, dtype=wide) if wants_hidden else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
    tile = tile_of(ctx.backend, shape_of(N, weight_VD), hidden_ND.new_empty(0, dtype=wide), mixture)
    T_N = temperature.detach().to(hidden_ND.device, torch.float64).expand(N).contiguous()
    sums = hidden_ND.new_zeros(len(mixture.weights), dtype=torch.float64)
    slopes_N = torch.zeros_like(T_N)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, N, tile.rows):
            rows = slice(start, min(start + tile.rows, N))
            n = rows.stop - rows.start
            x_ND = hidden_ND[rows].to(weight_VD.dtype)
            s_NV = _product(x_ND, weight_VD.T, tile.s_NV[:n])
            if set(mixture.weights) == {"ce"}:
                known = None
            elif isinstance(teacher, SparseTeacher):
                known = teacher.select(rows)
            else:
                states_NE = teacher.hidden_NE[rows].to(teacher.weight_VE.dtype)
                known = _product(states_NE, teacher.weight_VE.T, tile.t_NV[:n])
            targets_N = None if ctx.targets_N is None else ctx.targets_N[rows]
            tile_sums, slopes_N[rows] = tile(s_NV, known, targets_N, T_N[rows])
            sums += tile_sums
            grad_NV = s_NV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                _product(grad_NV, weight_VD, grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                _add_product(grad_NV.T, x_ND, grad_weight_VD)
    return sums.to(wide), Prepared(grad_hidden_ND, grad_weight_VD, slopes_N)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b in ``out``, whose dtype may be wider than the product's."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b

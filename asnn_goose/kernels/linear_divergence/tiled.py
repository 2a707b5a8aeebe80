"""Heads and divergences one tile of rows at a time, with the gradients computed in the forward pass.

A tile's logits of both models live in buffers that are used again for every tile: four of [TILE, V] for torch's
operations, two of [2 TILE, V] for the form that numba compiles. The gradient on the student's logits of the weighted
sum is known in closed form,

    d/ds [w_ce CE + w_kl T^2 KL(p || q)] = w_ce (softmax(s) - onehot) + w_kl T (q - p)

and is multiplied with the head at once, so that only [N, D] leaves the tile. The temperature's gradient is

    d/dT [T^2 KL] = 2 T KL - Cov_p(t, log p - log q) + E_p[s] - E_q[s]

Shapes: N rows, D student channels, E teacher channels, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asnn_goose.kernels.linear_divergence.rows import FORMULAS, ce_rows

TILE = 128
"""Rows per tile: large enough to reuse the head's weights, small enough for four buffers of TILE x V floats."""


CLOSED_FORM = {"ce", "forward_kl"}
"""What _TorchTile and _NativeTile know; other mixtures go through autograd, a tile at a time."""


class _TorchTile:
    """Sums and gradient of one tile by torch's operations, in any dtype and on any device."""

    def __init__(self, rows: int, V: int, like: Tensor, dtype: torch.dtype):
        self.rows = max(1, min(TILE, rows))
        self.s, self.t, self.work, self.grad = (like.new_empty(self.rows, V, dtype=dtype) for _ in range(4))

    def __call__(self, s, t, targets_N, weights, T, wants_slope):
        """({name: sum}, weighted sums' derivative in T, their gradient on s) of logits that lie in self.s and .t."""
        n = s.shape[0]
        grad, sums, slope = self.grad[:n].zero_(), {}, 0.0
        if "ce" in weights:
            sums["ce"] = _cross_entropy(s, targets_N, weights["ce"], grad).item()
        if "forward_kl" in weights:
            value, slope_ = _forward_kl(s, t, self.work[:n], T, weights["forward_kl"], grad, wants_slope)
            sums["forward_kl"], slope = value.item(), weights["forward_kl"] * slope_.item()
        return sums, slope, grad


class _NativeTile:
    """The same in two passes per row through numba; float32 on the CPU."""

    def __init__(self, rows: int, V: int, like: Tensor, dtype: torch.dtype):
        self.rows = max(1, min(2 * TILE, rows))
        self.s, self.t = (like.new_empty(self.rows, V, dtype=dtype) for _ in range(2))

    def __call__(self, s, t, targets_N, weights, T, wants_slope):
        from asnn_goose.kernels.linear_divergence.native import tile_native

        ce, kl, slope = tile_native(s, t, targets_N, weights.get("ce"), weights.get("forward_kl"), T, wants_slope)
        sums = {name: {"ce": ce, "forward_kl": kl}[name] for name in weights}
        return sums, weights.get("forward_kl", 0.0) * slope, s


class _AutogradTile:
    """Any mixture of divergences, with the gradient of its formulas by autograd within the tile."""

    def __init__(self, rows: int, V: int, like: Tensor, dtype: torch.dtype, options):
        self.rows = max(1, min(TILE, rows))
        self.s, self.t = (like.new_empty(self.rows, V, dtype=dtype) for _ in range(2))
        self.options = options

    def __call__(self, s, t, targets_N, weights, T, wants_slope):
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            temperature = torch.tensor(T, dtype=s.dtype, device=s.device, requires_grad=wants_slope)
            sums = {
                name: ce_rows(leaf, targets_N).sum()
                if name == "ce"
                else FORMULAS[name](leaf, t, temperature, **self.options.get(name, {})).sum()
                for name in weights
            }
            total = torch.stack([weights[name] * value for name, value in sums.items()]).sum()
        wanted = [leaf, temperature] if wants_slope else [leaf]
        grad, *slope = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        values = {name: value.item() for name, value in sums.items()}
        return values, slope[0].item() if slope else 0.0, grad


class TiledSums(torch.autograd.Function):
    """Sums over rows [len(names)]; backward accepts only multiples of the weights that forward was given."""

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, targets_N, options, weights, temperature,
        backend,
    ):  # fmt: skip
        N, V, names = hidden_ND.shape[0], weight_VD.shape[0], tuple(weights)
        T = float(temperature)
        wide = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight, wants_slope = (ctx.needs_input_grad[i] for i in (0, 1, 7))
        totals, grad_T = dict.fromkeys(names, 0.0), 0.0
        grad_hidden_ND = torch.empty_like(hidden_ND, dtype=wide) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if not set(names) <= CLOSED_FORM:
                tile = _AutogradTile(N, V, hidden_ND, wide, options)
            else:
                tile = (_NativeTile if backend == "native" else _TorchTile)(N, V, hidden_ND, wide)
            for start in range(0, N, tile.rows):
                rows = slice(start, min(start + tile.rows, N))
                n = rows.stop - rows.start
                x = hidden_ND[rows].to(weight_VD.dtype)
                s, t = _logits(x, weight_VD, tile.s[:n]), None
                if names != ("ce",):
                    t = _logits(teacher_hidden_NE[rows].to(teacher_weight_VE.dtype), teacher_weight_VE, tile.t[:n])
                targets = None if targets_N is None else targets_N[rows]
                sums, slope, grad = tile(s, t, targets, weights, T, wants_slope)
                totals = {name: total + sums[name] for name, total in totals.items()}
                grad_T += slope
                if grad_hidden_ND is not None or grad_weight_VD is not None:
                    narrow = grad.to(weight_VD.dtype)
                    if grad_hidden_ND is not None:
                        grad_hidden_ND[rows] = narrow @ weight_VD
                    if grad_weight_VD is not None:
                        grad_weight_VD += narrow.T @ x
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.grad_T, ctx.names, ctx.weights = grad_T, names, weights
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return torch.tensor(list(totals.values()), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        (grad_sums,) = grad_outputs
        weights = torch.tensor([ctx.weights[name] for name in ctx.names], dtype=grad_sums.dtype)
        used = weights != 0
        scale = (grad_sums[used] / weights[used]).mean() if used.any() else grad_sums.new_zeros(())
        if not torch.allclose(grad_sums, scale * weights, rtol=1e-4, atol=0.0):
            raise ValueError(
                f"linear_divergence prepared the gradient for weights {ctx.weights}, but was asked for one "
                f"proportional to {grad_sums.tolist()}: pass the weights that the sums are combined with"
            )
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        hidden = None if grad_hidden_ND is None else (grad_hidden_ND * scale).to(ctx.dtypes[0])
        weight = None if grad_weight_VD is None else (grad_weight_VD * scale).to(ctx.dtypes[1])
        temperature = None
        if ctx.needs_input_grad[7]:
            temperature = scale * ctx.grad_T if ctx.names != ("ce",) else None
        return hidden, weight, None, None, None, None, None, temperature, None


def _logits(x_ND: Tensor, weight_VD: Tensor, out_NV: Tensor) -> Tensor:
    """x W^T in out_NV, whose dtype may be wider than the product's."""
    if weight_VD.dtype == out_NV.dtype:
        return torch.mm(x_ND, weight_VD.T, out=out_NV)
    return out_NV.copy_(x_ND @ weight_VD.T)


def _cross_entropy(s_NV: Tensor, targets_N: Tensor, weight: float, grad_NV: Tensor) -> Tensor:
    """Sum of -log softmax(s)[target]; adds weight (softmax(s) - onehot) to grad_NV."""
    log_z_N1 = torch.logsumexp(s_NV, -1, keepdim=True)
    picked_N1 = s_NV.gather(1, targets_N[:, None])
    if weight:
        torch.sub(s_NV, log_z_N1, out=grad_NV).exp_().mul_(weight)
        grad_NV.scatter_add_(1, targets_N[:, None], torch.full_like(picked_N1, -weight))
    return (log_z_N1 - picked_N1).sum(dtype=torch.float64)


def _forward_kl(
    s_NV: Tensor, t_NV: Tensor, work_NV: Tensor, T: float, weight: float, grad_NV: Tensor, wants_slope: bool
) -> tuple[Tensor, Tensor]:
    """Sums of T^2 KL(p || q) and of its derivative in T; adds weight T (q - p) to grad_NV. Overwrites s, t and work.

    Logits made by a head are finite, so p may underflow to 0 but never meets an infinite log-ratio.
    """
    log_q_NV = s_NV.div_(T)
    log_q_NV.sub_(torch.logsumexp(s_NV, -1, keepdim=True))
    log_p_NV = t_NV.div_(T)
    log_p_NV.sub_(torch.logsumexp(t_NV, -1, keepdim=True))
    p_NV = torch.exp(log_p_NV, out=work_NV)
    gap_NV = log_p_NV.sub_(log_q_NV)
    kl_N = _dot(p_NV, gap_NV)
    grad_NV.sub_(p_NV, alpha=weight * T)
    slope_N = torch.zeros_like(kl_N)
    if wants_slope:
        # Centred, log q is as large as the logits' spread instead of log V, so that less cancels below. Its mean under
        # p is taken again, since p sums to 1 only up to rounding.
        centre_N1 = _dot(p_NV, log_q_NV)[:, None]
        log_q_NV.sub_(centre_N1)
        p_log_q_N = _dot(p_NV, log_q_NV)
        p_gap_NV = p_NV.mul_(gap_NV)
        # Cov_p(t/T, gap), where t/T is gap + log q up to a constant of the row.
        covariance_N = _dot(p_gap_NV, gap_NV) + _dot(p_gap_NV, log_q_NV) - kl_N * (kl_N + p_log_q_N)
        q_NV = torch.add(log_q_NV, centre_N1, out=work_NV).exp_()
        slope_N = 2.0 * T * kl_N - T * (covariance_N - p_log_q_N + _dot(q_NV, log_q_NV))
    else:
        q_NV = torch.exp(log_q_NV, out=work_NV)
    grad_NV.add_(q_NV, alpha=weight * T)
    return kl_N.sum(dtype=torch.float64) * T * T, slope_N.sum(dtype=torch.float64)


def _dot(x_NV: Tensor, y_NV: Tensor) -> Tensor:
    """Sum over V of x y, per row; only eight rows of the product exist at a time.

    A batched matrix product would need none of it, but adds up 50,000 terms in a row and loses 1e-5 of their sum.
    """
    return torch.cat([(x * y).sum(-1) for x, y in zip(x_NV.split(8), y_NV.split(8), strict=True)])

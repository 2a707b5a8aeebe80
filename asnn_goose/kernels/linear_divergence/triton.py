"""What a tile of logits contributes, on a GPU through Triton: one program per row, which reads it twice.

The first reading takes maxima and partitions together, each lane of the block with a maximum of its own; the second
forms the probabilities, adds everything up and writes the gradient in the student's place. Lanes add up in float32 and
are joined in float64. Logarithms are taken relative to the uniform distribution, so that little is lost to rounding;
the KL is summed as in native.py.

Shapes: N rows, V vocabulary.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# Pyright knows nothing of Triton's language, and may take "import triton" for this very file.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _fold(x, top, z, inverse):
    """(maximum, sum of exp((x - maximum) inverse)) of each lane with one more value."""
    higher = tl.maximum(top, x)
    return higher, z * tl.exp((top - higher) * inverse) + tl.exp((x - higher) * inverse)


@triton.jit
def _join(top, z, highest, inverse):
    """log of the lanes' common partition, relative to the row's maximum, in float64."""
    return tl.log(tl.sum((z * tl.exp((top - highest) * inverse)).to(tl.float64), axis=0))


@triton.jit
def _total(lanes):
    return tl.sum(lanes.to(tl.float64), axis=0)


@triton.jit
def _entropy(gap, p, q):
    """p gap + q - p, near 0 by the series of p (gap + e^-gap - 1), where the terms would cancel."""
    u = -gap
    series = 1 / 720 + u * (1 / 5040 + u * (1 / 40320))
    series = 1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * series)))
    return tl.where(tl.abs(u) <= 0.5, p * (u * u * series), p * gap + (q - p))


@triton.jit
def _tile_kernel(
    s, t, targets, temperatures, results, V, log_V, w_ce, w_kl,
    HAS_CE: tl.constexpr, HAS_KL: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s += row * V
    t += row * V
    results += row * 3
    T = tl.load(temperatures + row)
    inverse, factor = (1.0 / T).to(tl.float32), (w_kl * T).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    # Finite, since -inf minus itself is NaN; a lane that meets no token weighs exp(LOWEST - maximum) = 0.
    lowest = zero - 1.0e30

    s_top, t_top, z_1, z_s, z_t = lowest, lowest, zero, zero, zero
    for start in range(0, V, BLOCK):
        columns = start + lanes
        x = tl.load(s + columns, mask=columns < V, other=-1.0e30)
        if HAS_CE:
            higher, z_1 = _fold(x, s_top, z_1, 1.0)
        if HAS_KL:
            higher, z_s = _fold(x, s_top, z_s, inverse)
            y = tl.load(t + columns, mask=columns < V, other=-1.0e30)
            t_top, z_t = _fold(y, t_top, z_t, inverse)
        s_top = higher
    s_max, t_max = tl.max(s_top, axis=0), tl.max(t_top, axis=0)
    shift_1, shift_s, shift_t = 0.0, 0.0, 0.0
    if HAS_CE:
        log_z_1 = _join(s_top, z_1, s_max, 1.0)
        shift_1 = log_z_1.to(tl.float32)
        target = tl.load(targets + row)
    if HAS_KL:
        log_z_s, log_z_t = _join(s_top, z_s, s_max, inverse), _join(t_top, z_t, t_max, inverse)
        shift_s, shift_t = log_z_s.to(tl.float32), log_z_t.to(tl.float32)
        centre_s = (s_max + T * (log_z_s - log_V)).to(tl.float32)
        centre_t = (t_max + T * (log_z_t - log_V)).to(tl.float32)
        offset_s = (centre_s.to(tl.float64) - s_max) / T - log_z_s
        offset_t = (centre_t.to(tl.float64) - t_max) / T - log_z_t
        offset = (offset_t - offset_s).to(tl.float32)

    entropy, picked = zero, zero
    sum_p, sum_q, p_gap, p_lp, p_lq, q_lq, p_gap_lp = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, V, BLOCK):
        columns = start + lanes
        inside = columns < V
        x = tl.load(s + columns, mask=inside, other=0.0)
        grad = zero
        if HAS_CE:
            hit = columns == target
            picked += tl.where(hit, x - s_max, 0.0)
            grad += w_ce * (tl.exp(x - s_max - shift_1) - hit.to(tl.float32))
        if HAS_KL:
            y = tl.load(t + columns, mask=inside, other=0.0)
            q = tl.where(inside, tl.exp((x - s_max) * inverse - shift_s), 0.0)
            p = tl.where(inside, tl.exp((y - t_max) * inverse - shift_t), 0.0)
            grad += factor * (q - p)
            lq, lp = (x - centre_s) * inverse, (y - centre_t) * inverse
            gap = lp - lq + offset
            entropy += _entropy(gap, p, q)
            if SLOPE:
                p_gap += p * gap
                sum_p += p
                sum_q += q
                p_lp += p * lp
                p_lq += p * lq
                q_lq += q * lq
                p_gap_lp += p * gap * lp
        tl.store(s + columns, grad, mask=inside)

    if HAS_CE:
        tl.store(results, log_z_1 - _total(picked))
    if HAS_KL:
        kl = _total(entropy)
        tl.store(results + 1, kl * T * T)
        if SLOPE:
            mass = _total(sum_p)
            covariance = _total(p_gap_lp) / mass - _total(p_lp) / mass * (_total(p_gap) / mass)
            slope = 2.0 * kl - covariance + _total(p_lq) / mass - _total(q_lq) / _total(sum_q)
            tl.store(results + 2, slope * T)


def tile(
    s_NV: Tensor, t_NV: Tensor | None, targets_N: Tensor | None, T_N: Tensor, w_ce: float | None, w_kl: float | None,
    wants_slope: bool,
) -> Tensor:  # fmt: skip
    """As native.tile, of a tile of float32 logits on a GPU."""
    N, V = s_NV.shape
    results = s_NV.new_zeros(N, 3, dtype=torch.float64)
    with torch.cuda.device_of(s_NV):
        # A pointer that a flag leaves unread may be any tensor.
        _tile_kernel[(N,)](
            s_NV, s_NV if t_NV is None else t_NV, s_NV if targets_N is None else targets_N.contiguous(), T_N, results,
            V, math.log(V), float(w_ce or 0.0), float(w_kl or 0.0),
            HAS_CE=w_ce is not None, HAS_KL=w_kl is not None, SLOPE=wants_slope, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return results.T

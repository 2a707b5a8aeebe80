"""What a tile of logits contributes, in two passes over each row through numba: sums, temperature slope and gradient.

A row of both models' logits stays in the second-level cache between the passes. The first sums the exponentials, the
second forms the probabilities block by block and from them everything else. Blocks are added up in float64. The KL is a
sum of p g + q - p, into which an error of the partitions enters squared: T^2 multiplies it. For the slope, means under
p and q are divided by the sums of the very same rounded probabilities, so that a constant in the logits cancels.

Shapes: N rows, V vocabulary.
"""

import math

import numba
import numpy as np
import torch
from torch import Tensor

from asnn_goose.kernels.compiled import COMPILE, bound_numba_threads, numba_threads

BLOCK = 1024

ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
SMALLEST = np.float32(-87.0)
LOG2_E = np.float32(1.0 / math.log(2.0))
# ln 2 in two parts, the first with so few bits that its product with a small whole number is exact.
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
C2, C3, C4, C5, C6, C7, C8 = (np.float32(1.0 / math.factorial(n)) for n in range(2, 9))


@numba.njit(**COMPILE)
def _exponentials(x, centre, scale, shift, powers, out):
    """out = exp((x - centre) scale - shift), to 2 units in the last place; below exp(-87) it stays there.

    e^y = 2^n e^r with n = round(y / ln 2), e^r by its series and 2^n by its bits: numba's own exp is called value by
    value.
    """
    for i in range(x.size):
        y = (x[i] - centre) * scale - shift
        # Written so that NaN stays NaN.
        y = SMALLEST if y < SMALLEST else y
        n = np.floor(y * LOG2_E + HALF)
        r = (y - n * LN2_HIGH) - n * LN2_LOW
        out[i] = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))))
        powers[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    two_to_the_n = powers.view(np.float32)
    for i in range(x.size):
        out[i] *= two_to_the_n[i]


@numba.njit(fastmath={"reassoc"}, **COMPILE)
def _total(x):
    total = ZERO
    for i in range(x.size):
        total += x[i]
    return total


@numba.njit(fastmath={"reassoc"}, **COMPILE)
def _dot(x, y):
    total = ZERO
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@numba.njit(**COMPILE)
def _partition(row, centre, scale, powers, work):
    """Sum over the row of exp((x - centre) scale)."""
    z = 0.0
    for start in range(0, row.size, BLOCK):
        stop = min(start + BLOCK, row.size)
        size = stop - start
        _exponentials(row[start:stop], centre, scale, ZERO, powers[:size], work[:size])
        z += _total(work[:size])
    return z


@numba.njit(**COMPILE)
def _centred(x, centre, scale, out):
    for i in range(x.size):
        out[i] = (x[i] - centre) * scale


@numba.njit(**COMPILE)
def _gap(log_p, log_q, p, q, offset, p_gap, entropy):
    """entropy = p g + q - p, g = log p - log q: no term is negative, and its sum is the KL.

    Near 0 by the series of p (g + e^-g - 1), where the terms would cancel.
    """
    for i in range(p_gap.size):
        u = (log_q[i] - log_p[i]) - offset
        p_gap[i] = -p[i] * u
        if abs(u) <= HALF:
            series = C2 + u * (C3 + u * (C4 + u * (C5 + u * (C6 + u * (C7 + u * C8)))))
            entropy[i] = p[i] * (u * u * series)
        else:
            entropy[i] = p_gap[i] + (q[i] - p[i])


@numba.njit(**COMPILE)
def _write_scaled(probabilities, factor, out):
    for i in range(out.size):
        out[i] = factor * probabilities[i]


@numba.njit(**COMPILE)
def _add_difference(q, p, factor, out):
    for i in range(out.size):
        out[i] += factor * (q[i] - p[i])


@numba.njit(parallel=True, **COMPILE)
def _tile(
    s_NV, t_NV, s_max_N, t_max_N, targets_N, T_N, has_ce, has_kl, w_ce, w_kl, wants_slope, parts, ce_N, kl_N, slope_N
):  # fmt: skip
    """Overwrites s_NV with the gradient of w_ce CE + w_kl T^2 KL on the student's logits."""
    N, V = s_NV.shape
    log_V = math.log(V)
    for part in numba.prange(parts):
        powers = np.empty(BLOCK, np.int32)
        work = np.empty((7, BLOCK), np.float32)
        for n in range(part * N // parts, (part + 1) * N // parts):
            s, s_max = s_NV[n], s_max_N[n]
            T, inverse = T_N[n], np.float32(1.0 / T_N[n])
            shift_1, shift_s, shift_t = ZERO, ZERO, ZERO
            if has_ce:
                log_z = math.log(_partition(s, s_max, ONE, powers, work[0]))
                shift_1 = np.float32(log_z)
                ce_N[n] = log_z - (np.float64(s[targets_N[n]]) - np.float64(s_max))
            centre_s, centre_t, offset = ZERO, ZERO, 0.0
            if has_kl:
                log_z_s = math.log(_partition(s, s_max, inverse, powers, work[0]))
                log_z_t = math.log(_partition(t_NV[n], t_max_N[n], inverse, powers, work[0]))
                shift_s, shift_t = np.float32(log_z_s), np.float32(log_z_t)
                # Logarithms are taken relative to the uniform distribution, so that little is lost to rounding; the
                # centres' own rounding is the same for every token, and is taken back as offset.
                centre_s = np.float32(s_max + T * (log_z_s - log_V))
                centre_t = np.float32(t_max_N[n] + T * (log_z_t - log_V))
                offset = (np.float64(centre_t) - np.float64(t_max_N[n])) / T - log_z_t
                offset -= (np.float64(centre_s) - np.float64(s_max)) / T - log_z_s
            kl, sum_p, sum_q, p_gap_sum, p_lp, p_lq, q_lq, p_gap_lp = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for start in range(0, V, BLOCK):
                stop = min(start + BLOCK, V)
                size = stop - start
                x, bits = s[start:stop], powers[:size]
                if has_kl:
                    p, q, lp, lq = work[0, :size], work[1, :size], work[2, :size], work[3, :size]
                    p_gap, entropy = work[4, :size], work[5, :size]
                    t = t_NV[n, start:stop]
                    _exponentials(t, t_max_N[n], inverse, shift_t, bits, p)
                    _exponentials(x, s_max, inverse, shift_s, bits, q)
                    _centred(t, centre_t, inverse, lp)
                    _centred(x, centre_s, inverse, lq)
                    _gap(lp, lq, p, q, np.float32(offset), p_gap, entropy)
                    kl += _total(entropy)
                    if wants_slope:
                        p_gap_sum += _total(p_gap)
                        sum_p += _total(p)
                        sum_q += _total(q)
                        p_lp += _dot(p, lp)
                        p_lq += _dot(p, lq)
                        q_lq += _dot(q, lq)
                        p_gap_lp += _dot(p_gap, lp)
                if has_ce:
                    e = work[6, :size]
                    _exponentials(x, s_max, ONE, shift_1, bits, e)
                    _write_scaled(e, w_ce, x)
                else:
                    x[:] = ZERO
                if has_kl:
                    _add_difference(work[1, :size], work[0, :size], np.float32(w_kl * T), x)
            if has_ce:
                s[targets_N[n]] -= w_ce
            if has_kl:
                kl_N[n] = T * T * kl
                if wants_slope:
                    covariance = p_gap_lp / sum_p - (p_lp / sum_p) * (p_gap_sum / sum_p)
                    slope_N[n] = 2.0 * T * kl - T * (covariance - p_lq / sum_p + q_lq / sum_q)


def tile(
    s_NV: Tensor, t_NV: Tensor | None, targets_N: Tensor | None, T_N: Tensor, w_ce: float | None, w_kl: float | None,
    wants_slope: bool,
) -> Tensor:  # fmt: skip
    """CE, T^2 KL(p || q) and its derivative in T of each row, float64 [3, N], of a tile of float32 logits.

    T_N is float64. Overwrites s_NV with d/ds (w_ce CE + w_kl T^2 KL). A weight of None leaves its term out; it then
    counts as 0.
    """
    bound_numba_threads()
    N = s_NV.shape[0]
    results_3N = np.zeros((3, N))
    s_max_N = s_NV.amax(-1)
    t_max_N = s_max_N if t_NV is None else t_NV.amax(-1)
    targets_N = torch.zeros(N, dtype=torch.int64) if targets_N is None else targets_N
    _tile(
        s_NV.numpy(), (s_NV if t_NV is None else t_NV).numpy(), s_max_N.numpy(), t_max_N.numpy(), targets_N.numpy(),
        T_N.numpy(), w_ce is not None, w_kl is not None, np.float32(w_ce or 0.0), float(w_kl or 0.0), wants_slope,
        max(1, min(numba_threads(), N)), *results_3N,
    )  # fmt: skip
    return torch.from_numpy(results_3N)

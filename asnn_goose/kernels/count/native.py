"""The count on the CPU through numba: one pass over memory forward, one backward, token by token in the cache.

Shapes: N tokens, C channels, P parts of the tokens, one per thread.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from asnn_goose.kernels.compiled import COMPILE, bound_numba_threads, numba_threads
from asnn_goose.kernels.count.fused import Rounding
from asnn_goose.kernels.count.reference import SCALE_FLOOR

FLOOR, ZERO, ONE = np.float32(SCALE_FLOOR), np.float32(0.0), np.float32(1.0)

_sums: dict[str, Any] = COMPILE | {"fastmath": {"reassoc"}}
"""For loops whose sum may be formed in any order, which the compiler needs for vector instructions."""


@numba.njit(**_sums)
def _mean_size(x_C):
    total = ZERO
    for c in range(x_C.shape[0]):
        total += abs(x_C[c])
    return total / np.float32(x_C.shape[0])


@numba.njit(**COMPILE)
def _count(x_C, theta_C, scale, levels, offset, silence_C, s_C):
    for c in range(x_C.shape[0]):
        u = x_C[c] / (theta_C[c] * scale)
        size = abs(u)
        # Written so that a current that is not a number stays one.
        capped = ONE if size > ONE else size
        k = np.floor(capped * levels + offset)
        k = ZERO if size < silence_C[c] else k
        s_C[c] = np.copysign(k, u) / levels


@numba.njit(**_sums)
def _through_count(x_C, theta_C, scale, grad_s_C, grad_x_C, grad_theta_C):
    """Writes the part of dx that does not go through m, adds to dtheta, and returns the sum over channels of dm."""
    total = ZERO
    for c in range(x_C.shape[0]):
        gain = theta_C[c] * scale
        u = x_C[c] / gain
        within = (grad_s_C[c] if abs(u) <= ONE else ZERO) / gain
        grad_x_C[c] = within
        at_gain = within * u
        grad_theta_C[c] -= at_gain * scale
        total -= at_gain * theta_C[c]
    return total


@numba.njit(**COMPILE)
def _through_scale(x_C, share, grad_x_C):
    """Adds sign(x) times a share of dm."""
    for c in range(x_C.shape[0]):
        grad_x_C[c] += np.sign(x_C[c]) * share


@numba.njit(parallel=True, **COMPILE)
def _forward(x_NC, theta_C, per_token, levels, offset, silence_C, parts, s_NC, scale_N):
    N = x_NC.shape[0]
    for p in numba.prange(parts):
        for n in range(p * N // parts, (p + 1) * N // parts):
            scale = ONE
            if per_token:
                mean = _mean_size(x_NC[n])
                scale = FLOOR if mean < FLOOR else mean
            scale_N[n] = scale
            _count(x_NC[n], theta_C, scale, levels, offset, silence_C, s_NC[n])


@numba.njit(parallel=True, **COMPILE)
def _backward(x_NC, theta_C, per_token, scale_N, grad_s_NC, grad_scale_N, parts, grad_x_NC, grad_theta_PC):
    N, C = x_NC.shape
    for p in numba.prange(parts):
        for n in range(p * N // parts, (p + 1) * N // parts):
            scale = scale_N[n]
            total = _through_count(x_NC[n], theta_C, scale, grad_s_NC[n], grad_x_NC[n], grad_theta_PC[p])
            if per_token and scale > FLOOR:
                _through_scale(x_NC[n], (grad_scale_N[n] + total) / np.float32(C), grad_x_NC[n])


def _channels(value: Tensor, C: int) -> np.ndarray:
    return value.detach().float().expand(C).contiguous().numpy()


def forward(
    x_NC: Tensor, threshold: Tensor, silence: Tensor | None, rounding: Rounding, s_NC: Tensor, scale_N: Tensor
) -> None:
    """Writes s and each token's scale."""
    bound_numba_threads()
    C = x_NC.shape[1]
    silence = torch.zeros(()) if silence is None else silence
    _forward(
        x_NC.numpy(), _channels(threshold, C), rounding.per_token, np.float32(rounding.levels),
        np.float32(rounding.offset), _channels(silence, C), numba_threads(), s_NC.numpy(), scale_N.numpy(),
    )  # fmt: skip


def backward(
    x_NC: Tensor, grad_s_NC: Tensor, threshold: Tensor, scale_N: Tensor, grad_scale_N: Tensor, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """(grad_x_NC, gradient of theta per channel)."""
    bound_numba_threads()
    C, parts = x_NC.shape[1], numba_threads()
    grad_x_NC = torch.empty_like(x_NC)
    # One partial sum per thread and channel: no two threads add to one place, and the order is fixed.
    grad_theta_PC = torch.zeros(parts, C)
    _backward(
        x_NC.numpy(), _channels(threshold, C), rounding.per_token, scale_N.numpy(), grad_s_NC.numpy(),
        grad_scale_N.numpy(), parts, grad_x_NC.numpy(), grad_theta_PC.numpy(),
    )  # fmt: skip
    return grad_x_NC, grad_theta_PC.sum(0)


@numba.njit(**COMPILE)
def _tally(s_NC, levels, spikes_K, steps, tallied_3C):
    N, C = s_NC.shape
    for n in range(N):
        for c in range(C):
            size = abs(s_NC[n, c]) * levels
            # What is no number or beyond the levels must not be read for beyond the table.
            k = int(np.rint(min(size, levels))) if size >= ZERO else 0
            fired = spikes_K[k]
            tallied_3C[0, c] += fired
            tallied_3C[1, c] += k > 0
            tallied_3C[2, c] += fired == steps


def tally(s_xC: Tensor, levels: int, spikes_K: Tensor, steps: int) -> Tensor:
    """See tally.py."""
    tallied_3C = torch.zeros(3, s_xC.shape[-1], dtype=torch.int64)
    _tally(
        s_xC.detach().reshape(-1, s_xC.shape[-1]).contiguous().numpy(),
        np.float32(levels),
        spikes_K.numpy(),
        steps,
        tallied_3C.numpy(),
    )
    return tallied_3C


@numba.njit(**COMPILE)
def _on_and_off_levels(s_N, levels):
    on, off = 0, 0
    for n in range(s_N.shape[0]):
        s = s_N[n]
        is_level = s == np.rint(s * levels) / levels and abs(s) <= ONE
        on += is_level and s != ZERO
        off += not is_level
    return on, off


def on_and_off_levels(s: Tensor, levels: int) -> tuple[int, int]:
    """See tally.py."""
    return _on_and_off_levels(s.detach().reshape(-1).contiguous().numpy(), np.float32(levels))

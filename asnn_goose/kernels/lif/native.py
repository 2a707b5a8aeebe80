"""lif and lif_rate on the CPU through numba: one pass over memory forward, one backward.

Both passes walk blocks of one row's channels, small enough for the first-level cache, with the micro-steps as the
outer loop and the channels as the inner one, which the compiler turns into vector instructions. Backward runs the
forward micro-steps again from the input and keeps the membrane before each in a per-thread buffer of T x BLOCK floats.
No fast-math: a fused multiply-add would round differently from the reference and flip spikes at the threshold.

Shapes: T micro-steps, S stored steps, N rows, C channels (see fused.py); P parts of the rows, one per thread.
"""

import math

import numba
import numpy as np
import torch
from torch import Tensor

from asnn_goose.kernels.compiled import COMPILE, bound_numba_threads, numba_threads
from asnn_goose.kernels.lif.fused import Dynamics, Gradients, Inputs
from asnn_goose.kernels.lif.surrogate import CODES

BLOCK = 1024

ONE, ZERO, HALF = np.float32(1.0), np.float32(0.0), np.float32(0.5)


# Rows of a worker's scratch array: one array of constant size, so that the compiler can tell its rows apart.
THETA, BETA, V, G, GRAD_S, GRAD_V, GRAD_X, TOTAL, GRAD_THETA, GRAD_BETA, ROWS = range(11)


@numba.njit(**COMPILE)
def _fire_and_reset(W, x, spikes, size, ternary, hard):
    """One micro-step of a block: W[V] goes from the membrane before it to the one after its reset."""
    for c in range(size):
        u, theta = W[BETA, c] * W[V, c] + x[c], W[THETA, c]
        s = ONE if u >= theta else ZERO
        if ternary:
            s -= ONE if u <= -theta else ZERO
        spikes[c] = u if u != u else s
        if hard:
            W[V, c] = ZERO if s != ZERO else u
        else:
            W[V, c] = u - theta * s


@numba.njit(**COMPILE)
def _next_membrane(W, before, x, after, size, ternary, hard):
    """The same without spikes, from one array into another."""
    for c in range(size):
        u, theta = W[BETA, c] * before[c] + x[c], W[THETA, c]
        s = ONE if u >= theta else ZERO
        if ternary:
            s -= ONE if u <= -theta else ZERO
        if hard:
            after[c] = ZERO if s != ZERO else u
        else:
            after[c] = u - theta * s


@numba.njit(**COMPILE)
def _derivative(W, before, x, size, ternary, shape, width):
    """W[G] = g of a block's distances from the threshold, |u| - theta (ternary) or u - theta; see surrogate.py.

    One loop per shape: with a choice inside it a loop would not be turned into vector instructions.
    """
    inverse = ONE / width
    if shape == 0:
        scale = np.float32(math.pi) * inverse
        for c in range(size):
            u = W[BETA, c] * before[c] + x[c]
            z = ((abs(u) if ternary else u) - W[THETA, c]) * scale
            W[G, c] = inverse / (ONE + z * z)
    elif shape == 1:
        for c in range(size):
            u = W[BETA, c] * before[c] + x[c]
            z = abs((abs(u) if ternary else u) - W[THETA, c]) * inverse
            W[G, c] = inverse * max(ZERO, ONE - z)
    elif shape == 2:
        for c in range(size):
            u = W[BETA, c] * before[c] + x[c]
            # e^{-|z|} / (1 + e^{-|z|})^2 is s(1-s) without the overflow of e^{|z|}.
            e = np.exp(-abs((abs(u) if ternary else u) - W[THETA, c]) * inverse)
            W[G, c] = inverse * e / ((ONE + e) * (ONE + e))
    elif shape == 3:
        for c in range(size):
            u = W[BETA, c] * before[c] + x[c]
            z = ONE + abs((abs(u) if ternary else u) - W[THETA, c]) * inverse
            W[G, c] = inverse / (z * z)
    else:
        for c in range(size):
            u = W[BETA, c] * before[c] + x[c]
            z = abs((abs(u) if ternary else u) - W[THETA, c])
            W[G, c] = inverse if z <= HALF * width else ZERO


@numba.njit(**COMPILE)
def _back_through_step(W, before, x, grad_s, grad_x, size, ternary, hard, attached):
    """Backwards through one micro-step: W[GRAD_V] goes from the membrane after the reset to the one before the charge.

    attached says whether the reset carries gradient.
    """
    for c in range(size):
        u, theta, after = W[BETA, c] * before[c] + x[c], W[THETA, c], W[GRAD_V, c]
        sign = ONE
        if ternary:
            sign = (ONE if u > ZERO else ZERO) - (ONE if u < ZERO else ZERO)
        fired = ONE if sign * u >= theta else ZERO
        at_spike = grad_s[c]
        if attached:
            at_spike -= after * (u * sign if hard else theta)
        slope = W[G, c] * at_spike
        to_theta = slope
        if attached and not hard:
            to_theta += after * fired
        W[GRAD_THETA, c] -= sign * to_theta
        charged = slope + (after * (ONE - fired) if hard else after)
        W[GRAD_BETA, c] += charged * before[c]
        grad_x[c] = charged
        W[GRAD_V, c] = charged * W[BETA, c]


@numba.njit(**COMPILE)
def _back_through_soft_step(W, grad_s, grad_x, size, attached):
    """The same for a soft reset where threshold and decay need no gradient."""
    for c in range(size):
        after = W[GRAD_V, c]
        charged = after + W[G, c] * (grad_s[c] - (after * W[THETA, c] if attached else ZERO))
        grad_x[c] = charged
        W[GRAD_V, c] = charged * W[BETA, c]


@numba.njit(parallel=True, **COMPILE)
def _forward(x_SNC, threshold_C, decay_C, v0_NC, has_v0, steps, mean, ternary, hard, parts, spikes_SNC, v_NC):
    _, N, C = x_SNC.shape
    for p in numba.prange(parts):
        W = np.empty((ROWS, BLOCK), np.float32)
        for n in range(p * N // parts, (p + 1) * N // parts):
            for start in range(0, C, BLOCK):
                stop = min(start + BLOCK, C)
                size = stop - start
                W[THETA, :size] = threshold_C[start:stop]
                W[BETA, :size] = decay_C[start:stop]
                W[V] = ZERO
                if has_v0:
                    W[V, :size] = v0_NC[n, start:stop]
                if mean:
                    x, rate = x_SNC[0, n, start:stop], spikes_SNC[0, n, start:stop]
                    W[TOTAL] = ZERO
                    for _ in range(steps):
                        _fire_and_reset(W, x, rate, size, ternary, hard)
                        for c in range(size):
                            W[TOTAL, c] += rate[c]
                    for c in range(size):
                        rate[c] = W[TOTAL, c] / np.float32(steps)
                else:
                    for t in range(steps):
                        x, spikes = x_SNC[t, n, start:stop], spikes_SNC[t, n, start:stop]
                        _fire_and_reset(W, x, spikes, size, ternary, hard)
                    v_NC[n, start:stop] = W[V, :size]


@numba.njit(parallel=True, **COMPILE)
def _backward(
    x_SNC, threshold_C, decay_C, v0_NC, has_v0, steps, mean, ternary, hard, parts, attached, shape, width, parameters,
    grad_spikes_SNC, has_spikes, grad_last_NC, has_last, grad_x_SNC, grad_v0_NC, grad_threshold_PC, grad_decay_PC,
):  # fmt: skip
    _, N, C = x_SNC.shape
    for p in numba.prange(parts):
        W, before = np.zeros((ROWS, BLOCK), np.float32), np.zeros((steps, BLOCK), np.float32)
        for n in range(p * N // parts, (p + 1) * N // parts):
            for start in range(0, C, BLOCK):
                stop = min(start + BLOCK, C)
                size = stop - start
                W[THETA, :size] = threshold_C[start:stop]
                W[BETA, :size] = decay_C[start:stop]
                if has_v0:
                    before[0, :size] = v0_NC[n, start:stop]
                for t in range(steps - 1):
                    x = x_SNC[0 if mean else t, n, start:stop]
                    _next_membrane(W, before[t], x, before[t + 1], size, ternary, hard)
                W[GRAD_V] = ZERO
                if has_last:
                    W[GRAD_V, :size] = grad_last_NC[n, start:stop]
                if mean:
                    W[TOTAL] = ZERO
                if mean and has_spikes:
                    for c in range(size):
                        W[GRAD_S, c] = grad_spikes_SNC[0, n, start + c] / np.float32(steps)
                if hard or parameters:
                    W[GRAD_THETA] = ZERO
                    W[GRAD_BETA] = ZERO
                for back in range(steps):
                    t = steps - 1 - back
                    x = x_SNC[0 if mean else t, n, start:stop]
                    grad_s = W[GRAD_S] if mean or not has_spikes else grad_spikes_SNC[t, n, start:stop]
                    grad_x = W[GRAD_X] if mean else grad_x_SNC[t, n, start:stop]
                    _derivative(W, before[t], x, size, ternary, shape, width)
                    if hard or parameters:
                        _back_through_step(W, before[t], x, grad_s, grad_x, size, ternary, hard, attached)
                    else:
                        _back_through_soft_step(W, grad_s, grad_x, size, attached)
                    if mean:
                        for c in range(size):
                            W[TOTAL, c] += W[GRAD_X, c]
                if mean:
                    grad_x_SNC[0, n, start:stop] = W[TOTAL, :size]
                if has_v0:
                    grad_v0_NC[n, start:stop] = W[GRAD_V, :size]
                if parameters:
                    for c in range(size):
                        grad_threshold_PC[p, start + c] += W[GRAD_THETA, c]
                        grad_decay_PC[p, start + c] += W[GRAD_BETA, c]


def _float32(tensor: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.float32) if tensor is None else tensor.detach().float().numpy()


def _arguments(inputs: Inputs, dynamics: Dynamics) -> tuple:
    """What both passes take first."""
    bound_numba_threads()
    _, N, C = inputs.x_SNC.shape
    per_channel = (value.detach().float().expand(C).contiguous().numpy() for value in (inputs.threshold, inputs.decay))
    # One partial sum per thread and channel: no two threads add to one place, and the order is fixed.
    parts = max(1, min(numba_threads(), N))
    return (
        _float32(inputs.x_SNC), *per_channel, _float32(inputs.v0_NC), inputs.v0_NC is not None, dynamics.steps,
        dynamics.mean, dynamics.kind == "ternary", dynamics.reset == "hard", parts,
    )  # fmt: skip


def forward(inputs: Inputs, dynamics: Dynamics, spikes_SNC: Tensor, v_NC: Tensor | None) -> None:
    """Writes the spikes, or their mean, and the last membrane (None with ``mean``)."""
    narrow = spikes_SNC.dtype != torch.float32
    wide = torch.empty_like(spikes_SNC, dtype=torch.float32) if narrow else spikes_SNC
    _forward(*_arguments(inputs, dynamics), wide.numpy(), _float32(v_NC))  # pyright: ignore[reportCallIssue]
    if narrow:
        spikes_SNC.copy_(wide)


def backward(
    inputs: Inputs, dynamics: Dynamics, grad_spikes_SNC: Tensor | None, grad_v_NC: Tensor | None, parameters: bool
) -> Gradients:
    """Gradients of everything in ``inputs``, in float32; of threshold and decay only if ``parameters``, else 0."""
    arguments = _arguments(inputs, dynamics)
    parts, C = arguments[-1], inputs.x_SNC.shape[2]
    surrogate = (
        not dynamics.detach_reset,
        CODES[dynamics.surrogate],
        np.float32(dynamics.width),
        parameters,
    )
    spikes = torch.zeros(1, 1, 1) if grad_spikes_SNC is None else grad_spikes_SNC
    arrivals = (_float32(spikes), grad_spikes_SNC is not None, _float32(grad_v_NC), grad_v_NC is not None)
    grad_x = torch.empty_like(inputs.x_SNC, dtype=torch.float32)
    grad_v0 = None if inputs.v0_NC is None else torch.empty_like(inputs.v0_NC, dtype=torch.float32)
    partial = torch.zeros(2, parts, C)
    results = (grad_x.numpy(), _float32(grad_v0), partial[0].numpy(), partial[1].numpy())
    _backward(*arguments, *surrogate, *arrivals, *results)  # pyright: ignore[reportCallIssue]
    return Gradients(grad_x, partial[0].sum(0), partial[1].sum(0), grad_v0)

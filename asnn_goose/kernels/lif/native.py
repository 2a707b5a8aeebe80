"""lif and lif_rate on the CPU through numba: one pass over memory forward, one backward.

Both passes walk blocks of one row's channels, small enough for the first-level cache, with the micro-steps as the
outer loop and the channels as the inner one, which the compiler turns into vector instructions. Backward runs the
forward micro-steps again from the input and keeps their charged voltages in a per-thread buffer of T x BLOCK floats.
No fast-math: a fused multiply-add would round differently from the reference and flip spikes at the threshold.

Shapes: T micro-steps, S stored steps, N rows, C channels (see fused.py); P parts of the rows, one per thread.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from asnn_goose.kernels.lif.fused import Dynamics, Gradients, Inputs
from asnn_goose.kernels.threads import bound_numba_threads, numba_threads

BLOCK = 512
SHAPES = {"atan": 0, "triangle": 1, "sigmoid": 2, "superspike": 3, "rectangle": 4}

ONE, ZERO, HALF = np.float32(1.0), np.float32(0.0), np.float32(0.5)

_compile: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


# Rows of a worker's scratch array. One array of constant size, so that the compiler knows its rows apart.
THETA, BETA, V, U, G, GRAD_S, GRAD_V, GRAD_THETA, GRAD_BETA, ROWS = range(10)


@numba.njit(**_compile)
def _charge(before, x, W, size):
    """u = beta v + x for a block; the same operations wherever the membrane is charged."""
    for c in range(size):
        W[U, c] = W[BETA, c] * before[c] + x[c]


@numba.njit(**_compile)
def _derivative(W, size, ternary, shape, width):
    """g of a block's distances from the threshold, |u| - theta (ternary) or u - theta (binary); see surrogate.py."""
    inverse = ONE / width
    binary = ONE - ternary
    if shape == 0:
        for c in range(size):
            z = (abs(W[U, c]) * ternary + W[U, c] * binary - W[THETA, c]) * (np.float32(math.pi) * inverse)
            W[G, c] = inverse / (ONE + z * z)
    elif shape == 1:
        for c in range(size):
            z = abs(abs(W[U, c]) * ternary + W[U, c] * binary - W[THETA, c])
            W[G, c] = inverse * max(ZERO, ONE - z * inverse)
    elif shape == 2:
        for c in range(size):
            z = abs(abs(W[U, c]) * ternary + W[U, c] * binary - W[THETA, c])
            # e^{-|z|} / (1 + e^{-|z|})^2 is s(1-s) without the overflow of e^{|z|}.
            e = np.exp(-z * inverse)
            W[G, c] = inverse * e / ((ONE + e) * (ONE + e))
    elif shape == 3:
        for c in range(size):
            z = ONE + abs(abs(W[U, c]) * ternary + W[U, c] * binary - W[THETA, c]) * inverse
            W[G, c] = inverse / (z * z)
    else:
        for c in range(size):
            z = abs(abs(W[U, c]) * ternary + W[U, c] * binary - W[THETA, c])
            W[G, c] = inverse if z <= HALF * width else ZERO


@numba.njit(**_compile)
def _through_spike(W, size, ternary, soft, hard, attached):
    """Backwards through one micro-step's reset and spike.

    GRAD_V comes as the gradient of the membrane after the reset and leaves as that of the charged one. attached is 1
    where the reset carries gradient.
    """
    for c in range(size):
        u, theta, after = W[U, c], W[THETA, c], W[GRAD_V, c]
        sign = (ONE if u > ZERO else ONE - ternary) - (ternary if u < ZERO else ZERO)
        fired = ONE if sign * u >= theta else ZERO
        slope = W[G, c] * (W[GRAD_S, c] - attached * after * (hard * u * sign + soft * theta))
        W[GRAD_THETA, c] -= sign * (slope + attached * soft * after * fired)
        W[GRAD_V, c] = after * (ONE - hard * fired) + slope


@numba.njit(**_compile)
def _through_soft_spike(W, size, attached):
    """The same for a soft reset where threshold and decay need no gradient, as in a network with fixed neurons."""
    for c in range(size):
        after = W[GRAD_V, c]
        W[GRAD_V, c] = after + W[G, c] * (W[GRAD_S, c] - attached * after * W[THETA, c])


@numba.njit(parallel=True, **_compile)
def _forward(x_SNC, threshold_C, decay_C, v0_NC, has_v0, steps, mean, ternary, soft, hard, parts, spikes_SNC, v_NC):
    _, N, C = x_SNC.shape
    for p in numba.prange(parts):
        W = np.empty((ROWS, BLOCK), np.float32)
        for start in range(0, C, BLOCK):
            stop = min(start + BLOCK, C)
            size = stop - start
            W[THETA, :size] = threshold_C[start:stop]
            W[BETA, :size] = decay_C[start:stop]
            for n in range(p * N // parts, (p + 1) * N // parts):
                if has_v0:
                    W[V, :size] = v0_NC[n, start:stop]
                else:
                    W[V, :size] = ZERO
                if mean:
                    W[G, :size] = ZERO
                for t in range(steps):
                    x, spikes = x_SNC[0 if mean else t, n, start:stop], spikes_SNC[0 if mean else t, n, start:stop]
                    for c in range(size):
                        u, theta = W[BETA, c] * W[V, c] + x[c], W[THETA, c]
                        up = ONE if u >= theta else ZERO
                        down = ternary if u <= -theta else ZERO
                        spikes[c] = up - down
                        W[V, c] = u * (ONE - hard * (up + down)) - soft * theta * (up - down)
                    if mean:
                        for c in range(size):
                            W[G, c] += spikes[c]
                if mean:
                    spikes = spikes_SNC[0, n, start:stop]
                    for c in range(size):
                        spikes[c] = W[G, c] / np.float32(steps)
                else:
                    v_NC[n, start:stop] = W[V, :size]


@numba.njit(parallel=True, **_compile)
def _backward(
    x_SNC, threshold_C, decay_C, v0_NC, has_v0, steps, mean, ternary, soft, hard, parts, attached, shape, width,
    parameters, grad_spikes_SNC, has_spikes, grad_last_NC, has_last, grad_x_SNC, grad_v0_NC, grad_threshold_PC,
    grad_decay_PC,
):  # fmt: skip
    _, N, C = x_SNC.shape
    for p in numba.prange(parts):
        W, before = np.zeros((ROWS, BLOCK), np.float32), np.empty((steps, BLOCK), np.float32)
        for start in range(0, C, BLOCK):
            stop = min(start + BLOCK, C)
            size = stop - start
            W[THETA, :size] = threshold_C[start:stop]
            W[BETA, :size] = decay_C[start:stop]
            W[GRAD_THETA] = ZERO
            W[GRAD_BETA] = ZERO
            for n in range(p * N // parts, (p + 1) * N // parts):
                if has_v0:
                    before[0, :size] = v0_NC[n, start:stop]
                else:
                    before[0, :size] = ZERO
                for t in range(steps - 1):
                    x, old, new = x_SNC[0 if mean else t, n, start:stop], before[t], before[t + 1]
                    for c in range(size):
                        u, theta = W[BETA, c] * old[c] + x[c], W[THETA, c]
                        up = ONE if u >= theta else ZERO
                        down = ternary if u <= -theta else ZERO
                        new[c] = u * (ONE - hard * (up + down)) - soft * theta * (up - down)
                if has_last:
                    W[GRAD_V, :size] = grad_last_NC[n, start:stop]
                else:
                    W[GRAD_V, :size] = ZERO
                if mean:
                    W[GRAD_S, :size] = grad_spikes_SNC[0, n, start:stop] / np.float32(steps)
                    grad_x_SNC[0, n, start:stop] = ZERO
                for back in range(steps):
                    t = steps - 1 - back
                    x, grad_x = x_SNC[0 if mean else t, n, start:stop], grad_x_SNC[0 if mean else t, n, start:stop]
                    if has_spikes and not mean:
                        W[GRAD_S, :size] = grad_spikes_SNC[t, n, start:stop]
                    _charge(before[t], x, W, size)
                    _derivative(W, size, ternary, shape, width)
                    if hard == ONE or parameters:
                        _through_spike(W, size, ternary, soft, hard, attached)
                    else:
                        _through_soft_spike(W, size, attached)
                    if mean:
                        for c in range(size):
                            grad_x[c] += W[GRAD_V, c]
                    else:
                        grad_x[:] = W[GRAD_V, :size]
                    if parameters:
                        old = before[t]
                        for c in range(size):
                            W[GRAD_BETA, c] += W[GRAD_V, c] * old[c]
                    for c in range(size):
                        W[GRAD_V, c] *= W[BETA, c]
                if has_v0:
                    grad_v0_NC[n, start:stop] = W[GRAD_V, :size]
            grad_threshold_PC[p, start:stop] = W[GRAD_THETA, :size]
            grad_decay_PC[p, start:stop] = W[GRAD_BETA, :size]


def _float32(tensor: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.float32) if tensor is None else tensor.detach().float().numpy()


def _arguments(inputs: Inputs, dynamics: Dynamics) -> tuple:
    """What both passes take first: arrays in float32, and flags that enter the arithmetic as 0 or 1."""
    bound_numba_threads()
    _, N, C = inputs.x_SNC.shape
    per_channel = (value.detach().float().expand(C).contiguous().numpy() for value in (inputs.threshold, inputs.decay))
    factors = (dynamics.kind == "ternary", dynamics.reset == "soft", dynamics.reset == "hard")
    # One partial sum per thread and channel: no two threads add to one place, and the order is fixed.
    parts = max(1, min(numba_threads(), N))
    return (
        _float32(inputs.x_SNC), *per_channel, _float32(inputs.v0_NC), inputs.v0_NC is not None, dynamics.steps,
        dynamics.mean, *(np.float32(factor) for factor in factors), parts,
    )  # fmt: skip


def forward(inputs: Inputs, dynamics: Dynamics) -> tuple[Tensor, Tensor | None]:
    """(spikes_SNC, last membrane [N, C]; None with ``mean``)."""
    x = inputs.x_SNC
    spikes = torch.empty_like(x, dtype=torch.float32)
    v = x.new_empty((0, 0) if dynamics.mean else x.shape[1:], dtype=torch.float32)
    _forward(*_arguments(inputs, dynamics), spikes.numpy(), v.numpy())  # pyright: ignore[reportCallIssue]
    return (spikes, None) if dynamics.mean else (spikes.to(x.dtype), v)


def backward(
    inputs: Inputs, dynamics: Dynamics, grad_spikes_SNC: Tensor | None, grad_v_NC: Tensor | None, parameters: bool
) -> Gradients:
    """Gradients of everything in ``inputs``, in float32; of threshold and decay only if ``parameters``, else 0."""
    arguments = _arguments(inputs, dynamics)
    parts, C = arguments[-1], inputs.x_SNC.shape[2]
    surrogate = (
        np.float32(not dynamics.detach_reset),
        SHAPES[dynamics.surrogate],
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

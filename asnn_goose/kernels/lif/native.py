"""lif_rate on the CPU through numba: one pass over memory forward, one backward, no time axis ever stored.

Both passes walk blocks of one row's channels, small enough for the first-level cache, with the micro-steps as the
outer loop and the channels as the inner one, which the compiler turns into vector instructions. Backward runs the
forward micro-steps again from the input and keeps their charged voltages in a per-thread buffer of T x BLOCK floats.
No fast-math: a fused multiply-add would round differently from the reference and flip spikes at the threshold.

Shapes: N rows, C channels, T micro-steps.
"""

import math

import numba
import numpy as np
import torch
from torch.autograd.function import once_differentiable

from asnn_goose.kernels.threads import bound_numba_threads, numba_threads

BLOCK = 512
SHAPES = {"atan": 0, "triangle": 1, "sigmoid": 2, "superspike": 3, "rectangle": 4}

ONE, ZERO, HALF = np.float32(1.0), np.float32(0.0), np.float32(0.5)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _charge_and_fire(x, theta, beta, before, charged, after, ternary, soft, hard):
    """One micro-step of a block. ternary, soft and hard are 0 or 1: as factors they keep the loop free of branches."""
    for c in range(x.size):
        u = beta[c] * before[c] + x[c]
        up = ONE if u >= theta[c] else ZERO
        down = ternary if u <= -theta[c] else ZERO
        charged[c] = u
        after[c] = u * (ONE - hard * (up + down)) - soft * theta[c] * (up - down)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_spikes(charged, theta, ternary, total):
    for c in range(charged.size):
        up = ONE if charged[c] >= theta[c] else ZERO
        down = ternary if charged[c] <= -theta[c] else ZERO
        total[c] += up - down


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _derivative(charged, theta, ternary, shape, width, g):
    """g(u) of a block, u = |v| - theta (ternary) or v - theta (binary); see surrogate.py."""
    inverse = ONE / width
    for c in range(charged.size):
        v = charged[c]
        g[c] = abs(v) * ternary + v * (ONE - ternary) - theta[c]
    if shape == 0:
        for c in range(g.size):
            z = g[c] * (np.float32(math.pi) * inverse)
            g[c] = inverse / (ONE + z * z)
    elif shape == 1:
        for c in range(g.size):
            g[c] = inverse * max(ZERO, ONE - abs(g[c]) * inverse)
    elif shape == 2:
        for c in range(g.size):
            # e^{-|z|} / (1 + e^{-|z|})^2 is s(1-s) without the overflow of e^{|z|}.
            e = np.exp(-abs(g[c] * inverse))
            g[c] = inverse * e / ((ONE + e) * (ONE + e))
    elif shape == 3:
        for c in range(g.size):
            z = ONE + abs(g[c]) * inverse
            g[c] = inverse / (z * z)
    else:
        for c in range(g.size):
            g[c] = inverse if abs(g[c]) <= HALF * width else ZERO


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _through_spike(charged, theta, g, grad_mean, ternary, soft, hard, attached, grad_v, grad_theta):
    """Backwards through one micro-step's reset and spike.

    grad_mean is the gradient of one spike; grad_v goes from the membrane after the reset to the charged one. attached
    is 1 where the reset carries gradient. A loop over more arrays than these would not become vector instructions.
    """
    for c in range(charged.size):
        u = charged[c]
        sign = (ONE if u > ZERO else ONE - ternary) - (ternary if u < ZERO else ZERO)
        fired = ONE if sign * u >= theta[c] else ZERO
        after = grad_v[c]
        slope = g[c] * (grad_mean[c] - attached * after * (hard * u * sign + soft * theta[c]))
        grad_theta[c] -= sign * (slope + attached * soft * after * fired)
        grad_v[c] = after * (ONE - hard * fired) + slope


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _through_charge(before, beta, grad_v, grad_x, grad_beta):
    """Backwards through u = beta v + x; grad_v goes from the charged membrane to the one before."""
    for c in range(grad_v.size):
        grad_x[c] += grad_v[c]
        grad_beta[c] += grad_v[c] * before[c]
        grad_v[c] *= beta[c]


@numba.njit(cache=True, parallel=True, nogil=True)
def _forward(x_NC, threshold_C, decay_C, v0_NC, has_v0, steps, ternary, soft, hard, parts, rate_NC):
    N, C = x_NC.shape
    for p in numba.prange(parts):
        # Two membranes in turn: a loop that reads and writes one array is not turned into vector instructions.
        v, charged = np.empty((2, BLOCK), np.float32), np.empty(BLOCK, np.float32)
        for n in range(p * N // parts, (p + 1) * N // parts):
            for start in range(0, C, BLOCK):
                stop = min(start + BLOCK, C)
                size = stop - start
                x, theta, beta = x_NC[n, start:stop], threshold_C[start:stop], decay_C[start:stop]
                rate = rate_NC[n, start:stop]
                rate[:] = ZERO
                if has_v0:
                    v[0, :size] = v0_NC[n, start:stop]
                else:
                    v[0, :size] = ZERO
                for t in range(steps):
                    old, new = v[t % 2, :size], v[(t + 1) % 2, :size]
                    _charge_and_fire(x, theta, beta, old, charged[:size], new, ternary, soft, hard)
                    _add_spikes(charged[:size], theta, ternary, rate)
                for c in range(size):
                    rate[c] = rate[c] / np.float32(steps)


@numba.njit(cache=True, parallel=True, nogil=True)
def _backward(
    x_NC, threshold_C, decay_C, v0_NC, has_v0, steps, ternary, soft, hard, parts, attached, shape, width, grad_rate_NC,
    grad_x_NC, grad_v0_NC, grad_threshold_PC, grad_decay_PC,
):  # fmt: skip
    N, C = x_NC.shape
    for p in numba.prange(parts):
        before, charged = np.empty((steps + 1, BLOCK), np.float32), np.empty((steps, BLOCK), np.float32)
        grad_v, grad_mean, g = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        for n in range(p * N // parts, (p + 1) * N // parts):
            for start in range(0, C, BLOCK):
                stop = min(start + BLOCK, C)
                size = stop - start
                x, theta, beta = x_NC[n, start:stop], threshold_C[start:stop], decay_C[start:stop]
                grad_x = grad_x_NC[n, start:stop]
                grad_x[:] = ZERO
                grad_v[:size] = ZERO
                if has_v0:
                    before[0, :size] = v0_NC[n, start:stop]
                else:
                    before[0, :size] = ZERO
                for c in range(size):
                    grad_mean[c] = grad_rate_NC[n, start + c] / np.float32(steps)
                for t in range(steps):
                    _charge_and_fire(
                        x, theta, beta, before[t, :size], charged[t, :size], before[t + 1, :size], ternary, soft, hard
                    )
                for back in range(steps):
                    t = steps - 1 - back
                    _derivative(charged[t, :size], theta, ternary, shape, width, g[:size])
                    _through_spike(
                        charged[t, :size], theta, g[:size], grad_mean[:size], ternary, soft, hard, attached,
                        grad_v[:size], grad_threshold_PC[p, start:stop],
                    )  # fmt: skip
                    _through_charge(before[t, :size], beta, grad_v[:size], grad_x, grad_decay_PC[p, start:stop])
                if has_v0:
                    grad_v0_NC[n, start:stop] = grad_v[:size]


class NativeRate(torch.autograd.Function):
    """Mean spike in float32; gradients for current, threshold, decay and initial membrane."""

    @staticmethod
    def forward(ctx, current, steps, threshold, decay, kind, reset, detach_reset, surrogate, width, v0):
        bound_numba_threads()
        C = current.shape[-1]
        x_NC = current.detach().float().reshape(-1, C).contiguous()
        threshold_C = threshold.detach().float().expand(C).contiguous()
        decay_C = decay.detach().float().expand(C).contiguous()
        v0_NC = x_NC.new_empty(0, 0) if v0 is None else v0.detach().float().reshape(-1, C).contiguous()
        rate_NC = torch.empty_like(x_NC)
        factors = [np.float32(flag) for flag in (kind == "ternary", reset == "soft", reset == "hard")]
        # One partial sum per thread and channel: no two threads add to one place, and the order is fixed.
        flags = (v0 is not None, steps, *factors, max(1, min(numba_threads(), x_NC.shape[0])))
        inputs = [tensor.numpy() for tensor in (x_NC, threshold_C, decay_C, v0_NC)]
        _forward(*inputs, *flags, rate_NC.numpy())  # pyright: ignore[reportCallIssue]
        ctx.save_for_backward(x_NC, threshold_C, decay_C, v0_NC)
        ctx.flags, ctx.tail = flags, (np.float32(not detach_reset), SHAPES[surrogate], np.float32(width))
        ctx.shapes = current.shape, threshold.shape, decay.shape, None if v0 is None else v0.shape
        ctx.dtypes = current.dtype, threshold.dtype, decay.dtype, None if v0 is None else v0.dtype
        return rate_NC.view(current.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        x_NC, threshold_C, decay_C, v0_NC = ctx.saved_tensors
        C = x_NC.shape[1]
        grad_NC = grad_outputs[0].float().reshape(-1, C).contiguous()
        parts = ctx.flags[-1]
        grad_x_NC = torch.empty_like(x_NC)
        grad_v0_NC = torch.empty_like(v0_NC)
        grad_threshold_PC, grad_decay_PC = x_NC.new_zeros(parts, C), x_NC.new_zeros(parts, C)
        inputs = [tensor.numpy() for tensor in (x_NC, threshold_C, decay_C, v0_NC)]
        outputs = [tensor.numpy() for tensor in (grad_x_NC, grad_v0_NC, grad_threshold_PC, grad_decay_PC)]
        _backward(*inputs, *ctx.flags, *ctx.tail, grad_NC.numpy(), *outputs)  # pyright: ignore[reportCallIssue]
        current, threshold, decay, v0 = (
            None if shape is None else grad.sum_to_size(shape).to(dtype) if name else grad.view(shape).to(dtype)
            for name, grad, shape, dtype in zip(
                (False, True, True, False),
                (grad_x_NC, grad_threshold_PC.sum(0), grad_decay_PC.sum(0), grad_v0_NC),
                ctx.shapes, ctx.dtypes, strict=True,
            )
        )  # fmt: skip
        return current, None, threshold, decay, None, None, None, None, None, v0

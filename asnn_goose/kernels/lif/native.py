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

BLOCK = 1024
SHAPES = {"atan": 0, "triangle": 1, "sigmoid": 2, "superspike": 3, "rectangle": 4}


@numba.njit(cache=True, parallel=True, nogil=True)
def _forward(x_NC, threshold_C, decay_C, v0_NC, has_v0, steps, binary, hard, rate_NC):
    N, C = x_NC.shape
    for n in numba.prange(N):
        v = np.empty(BLOCK, np.float32)
        count = np.empty(BLOCK, np.float32)
        for start in range(0, C, BLOCK):
            width = min(BLOCK, C - start)
            for c in range(width):
                v[c] = v0_NC[n, start + c] if has_v0 else np.float32(0.0)
                count[c] = np.float32(0.0)
            for _ in range(steps):
                for c in range(width):
                    theta = threshold_C[start + c]
                    charged = decay_C[start + c] * v[c] + x_NC[n, start + c]
                    up = np.float32(1.0) if charged >= theta else np.float32(0.0)
                    down = np.float32(1.0) if (charged <= -theta and not binary) else np.float32(0.0)
                    s = up - down
                    count[c] += s
                    v[c] = charged * (np.float32(1.0) - abs(s)) if hard else charged - theta * s
            for c in range(width):
                rate_NC[n, start + c] = count[c] / np.float32(steps)


@numba.njit(cache=True, nogil=True, inline="always")
def _derivative(u, shape, width):
    inverse = np.float32(1.0) / width
    if shape == 0:
        z = u * (np.float32(math.pi) * inverse)
        return inverse / (np.float32(1.0) + z * z)
    if shape == 1:
        return inverse * max(np.float32(0.0), np.float32(1.0) - abs(u) * inverse)
    if shape == 2:
        # e^{-|z|} / (1 + e^{-|z|})^2 is s(1-s) without the overflow of e^{|z|}.
        e = np.exp(-abs(u * inverse))
        return inverse * e / ((np.float32(1.0) + e) * (np.float32(1.0) + e))
    if shape == 3:
        z = np.float32(1.0) + abs(u) * inverse
        return inverse / (z * z)
    return inverse * np.float32(abs(u) <= np.float32(0.5) * width)


@numba.njit(cache=True, parallel=True, nogil=True)
def _backward(
    x_NC, threshold_C, decay_C, v0_NC, has_v0, grad_rate_NC, steps, binary, hard, detach, shape, width,
    grad_x_NC, grad_v0_NC, grad_threshold_PC, grad_decay_PC,
):  # fmt: skip
    N, C = x_NC.shape
    parts = grad_threshold_PC.shape[0]
    for p in numba.prange(parts):
        before = np.empty((steps + 1, BLOCK), np.float32)
        charged = np.empty((steps, BLOCK), np.float32)
        grad_v = np.empty(BLOCK, np.float32)
        for n in range(p * N // parts, (p + 1) * N // parts):
            for start in range(0, C, BLOCK):
                block = min(BLOCK, C - start)
                for c in range(block):
                    before[0, c] = v0_NC[n, start + c] if has_v0 else np.float32(0.0)
                    grad_v[c] = np.float32(0.0)
                    grad_x_NC[n, start + c] = np.float32(0.0)
                for t in range(steps):
                    for c in range(block):
                        theta = threshold_C[start + c]
                        u = decay_C[start + c] * before[t, c] + x_NC[n, start + c]
                        up = np.float32(1.0) if u >= theta else np.float32(0.0)
                        down = np.float32(1.0) if (u <= -theta and not binary) else np.float32(0.0)
                        s = up - down
                        charged[t, c] = u
                        before[t + 1, c] = u * (np.float32(1.0) - abs(s)) if hard else u - theta * s
                for back in range(steps):
                    t = steps - 1 - back
                    for c in range(block):
                        theta = threshold_C[start + c]
                        u = charged[t, c]
                        sign = np.float32(1.0) if (u >= 0 or binary) else np.float32(-1.0)
                        fired = np.float32(1.0) if sign * u >= theta else np.float32(0.0)
                        g = _derivative(sign * u - theta, shape, width)
                        grad_s = grad_rate_NC[n, start + c] / np.float32(steps)
                        after = grad_v[c]
                        through = after * (np.float32(1.0) - fired) if hard else after
                        grad_theta = np.float32(0.0)
                        if not detach:
                            grad_s -= after * u * sign if hard else after * theta
                            grad_theta = np.float32(0.0) if hard else -after * sign * fired
                        grad_u = through + grad_s * g
                        grad_threshold_PC[p, start + c] += grad_theta - sign * grad_s * g
                        grad_decay_PC[p, start + c] += grad_u * before[t, c]
                        grad_x_NC[n, start + c] += grad_u
                        grad_v[c] = grad_u * decay_C[start + c]
                if has_v0:
                    for c in range(block):
                        grad_v0_NC[n, start + c] = grad_v[c]


def _threads() -> int:
    """As many as torch uses, but never more than numba was started with."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore


class NativeRate(torch.autograd.Function):
    """Mean spike in float32; gradients for current, threshold, decay and initial membrane."""

    @staticmethod
    def forward(ctx, current, steps, threshold, decay, kind, reset, detach_reset, surrogate, width, v0):
        numba.set_num_threads(_threads())
        C = current.shape[-1]
        x_NC = current.detach().float().reshape(-1, C).contiguous()
        threshold_C = threshold.detach().float().expand(C).contiguous()
        decay_C = decay.detach().float().expand(C).contiguous()
        v0_NC = x_NC.new_empty(0, 0) if v0 is None else v0.detach().float().reshape(-1, C).contiguous()
        rate_NC = torch.empty_like(x_NC)
        flags = (v0 is not None, steps, kind == "binary", reset == "hard")
        inputs = [tensor.numpy() for tensor in (x_NC, threshold_C, decay_C, v0_NC)]
        _forward(*inputs, *flags, rate_NC.numpy())  # pyright: ignore[reportCallIssue]
        ctx.save_for_backward(x_NC, threshold_C, decay_C, v0_NC)
        ctx.flags, ctx.tail = flags, (detach_reset, SHAPES[surrogate], np.float32(width))
        ctx.shapes = current.shape, threshold.shape, decay.shape, None if v0 is None else v0.shape
        ctx.dtypes = current.dtype, threshold.dtype, decay.dtype, None if v0 is None else v0.dtype
        return rate_NC.view(current.shape)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x_NC, threshold_C, decay_C, v0_NC = ctx.saved_tensors
        C = x_NC.shape[1]
        grad_NC = grad_outputs[0].float().reshape(-1, C).contiguous()
        # One partial sum per thread and channel: no two threads add to one place, and the order is fixed.
        parts = min(_threads(), max(1, x_NC.shape[0]))
        grad_x_NC = torch.empty_like(x_NC)
        grad_v0_NC = torch.empty_like(v0_NC)
        grad_threshold_PC, grad_decay_PC = x_NC.new_zeros(parts, C), x_NC.new_zeros(parts, C)
        has_v0, *dynamics = ctx.flags
        inputs = [tensor.numpy() for tensor in (x_NC, threshold_C, decay_C, v0_NC)]
        outputs = [tensor.numpy() for tensor in (grad_x_NC, grad_v0_NC, grad_threshold_PC, grad_decay_PC)]
        _backward(*inputs, has_v0, grad_NC.numpy(), *dynamics, *ctx.tail, *outputs)  # pyright: ignore[reportCallIssue]
        current, threshold, decay, v0 = (
            None if shape is None else grad.sum_to_size(shape).to(dtype) if name else grad.view(shape).to(dtype)
            for name, grad, shape, dtype in zip(
                (False, True, True, False),
                (grad_x_NC, grad_threshold_PC.sum(0), grad_decay_PC.sum(0), grad_v0_NC),
                ctx.shapes, ctx.dtypes, strict=True,
            )
        )  # fmt: skip
        return current, None, threshold, decay, None, None, None, None, None, v0

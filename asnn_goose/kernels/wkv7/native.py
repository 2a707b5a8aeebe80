"""The WKV-7 recurrence on the CPU through numba: token by token, one head of one sequence per unit of work.

A head's state stays in the first-level cache for the whole sequence. It is kept transposed, rows keys and columns
values: then every sum over values (the gradients of r, w, k, a, b) reads and writes nothing, every sum over keys
(y, u = S a, and the gradients of v and u) adds rows, and both become vector instructions.

Forward keeps the state before every KEEP-th token; backward runs KEEP tokens again from there, holding their states
and their u, and then goes back over them. With S_t the gradient arriving at token t's state, per token:

    S_t += dy r^T,   dr = S^T dy,  dv = S_t k,  du = S_t b,   dk = S_t^T v,  db = S_t^T u
    dw_j = sum_i S_t[i, j] S[t-1][i, j],   da = S[t-1]^T du,   S_{t-1} = S_t diag(w) + du a^T

Sums are reassociated and contracted, which moves their rounding only.

Shapes: B batch, L tokens, H heads, K key channels, V value channels, N kept states, P = B H units of work.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from asnn_goose.kernels.compiled import COMPILE, bound_numba_threads
from asnn_goose.kernels.once import differentiable_once

KEEP = 16

ZERO = np.float32(0.0)

_compile: dict[str, Any] = COMPILE | {"fastmath": {"reassoc", "contract"}}


@numba.njit(**_compile)
def _add_rows(matrix_KV, factor_K, out_V):
    """out += sum_j factor_j matrix_j, four rows at a time."""
    K, V = matrix_KV.shape
    whole = K - K % 4
    for j in range(0, whole, 4):
        f0, f1, f2, f3 = factor_K[j], factor_K[j + 1], factor_K[j + 2], factor_K[j + 3]
        for i in range(V):
            out_V[i] += (f0 * matrix_KV[j, i] + f1 * matrix_KV[j + 1, i]) + (
                f2 * matrix_KV[j + 2, i] + f3 * matrix_KV[j + 3, i]
            )
    for j in range(whole, K):
        for i in range(V):
            out_V[i] += factor_K[j] * matrix_KV[j, i]


@numba.njit(**_compile)
def _next_state(before_KV, w_K, k_K, v_V, b_K, u_V, corrected, after_KV):
    """S_t from S_{t-1}, two arrays."""
    K, V = before_KV.shape
    for j in range(K):
        w, k = w_K[j], k_K[j]
        if corrected:
            b = b_K[j]
            for i in range(V):
                after_KV[j, i] = before_KV[j, i] * w + u_V[i] * b + v_V[i] * k
        else:
            for i in range(V):
                after_KV[j, i] = before_KV[j, i] * w + v_V[i] * k


@numba.njit(**_compile)
def _add_outer(matrix_KV, left_K, right_V):
    K, V = matrix_KV.shape
    for j in range(K):
        factor = left_K[j]
        for i in range(V):
            matrix_KV[j, i] += factor * right_V[i]


@numba.njit(**_compile)
def _sums_over_values(grad_KV, before_KV, after_KV, dy_V, v_V, u_V, du_V, corrected, dr_K, dw_K, dk_K, da_K, db_K):
    K, V = grad_KV.shape
    for j in range(K):
        dr, dw, dk, da, db = ZERO, ZERO, ZERO, ZERO, ZERO
        for i in range(V):
            dr += after_KV[j, i] * dy_V[i]
            dw += grad_KV[j, i] * before_KV[j, i]
            dk += grad_KV[j, i] * v_V[i]
        dr_K[j], dw_K[j], dk_K[j] = dr, dw, dk
        if corrected:
            for i in range(V):
                da += before_KV[j, i] * du_V[i]
                db += grad_KV[j, i] * u_V[i]
            da_K[j], db_K[j] = da, db


@numba.njit(**_compile)
def _previous_gradient(grad_KV, w_K, a_K, du_V, corrected):
    K, V = grad_KV.shape
    for j in range(K):
        w = w_K[j]
        if corrected:
            a = a_K[j]
            for i in range(V):
                grad_KV[j, i] = grad_KV[j, i] * w + du_V[i] * a
        else:
            for i in range(V):
                grad_KV[j, i] *= w


@numba.njit(parallel=True, **_compile)
def _forward(r, w, k, v, a, b, corrected, state_BHVK, keep, y, last_BHVK, kept_PNKV):
    B, L, H, K = r.shape
    V = v.shape[3]
    for p in numba.prange(B * H):
        n, h = p // H, p % H
        # Two states in turn: a loop that reads and writes one array is not turned into vector instructions.
        states, u = np.empty((2, K, V), np.float32), np.empty(V, np.float32)
        states[0] = state_BHVK[n, h].T
        for t in range(L):
            S, after = states[t % 2], states[(t + 1) % 2]
            if keep and t % KEEP == 0:
                kept_PNKV[p, t // KEEP] = S
            if corrected:
                u[:] = ZERO
                _add_rows(S, a[n, t, h], u)
                _next_state(S, w[n, t, h], k[n, t, h], v[n, t, h], b[n, t, h], u, True, after)
            else:
                _next_state(S, w[n, t, h], k[n, t, h], v[n, t, h], k[n, t, h], u, False, after)
            y[n, t, h] = ZERO
            _add_rows(after, r[n, t, h], y[n, t, h])
        last_BHVK[n, h] = states[L % 2].T


@numba.njit(parallel=True, **_compile)
def _backward(
    r, w, k, v, a, b, corrected, kept_PNKV, dy, grad_last_BHVK, dr, dw, dk, dv, da, db, grad_state_BHVK
):  # fmt: skip
    B, L, H, K = r.shape
    V = v.shape[3]
    for p in numba.prange(B * H):
        n, h = p // H, p % H
        states, u = np.empty((KEEP + 1, K, V), np.float32), np.empty((KEEP, V), np.float32)
        grad, du = np.empty((K, V), np.float32), np.empty(V, np.float32)
        grad[:] = grad_last_BHVK[n, h].T
        for segment in range(kept_PNKV.shape[1] - 1, -1, -1):
            start = segment * KEEP
            size = min(KEEP, L - start)
            states[0] = kept_PNKV[p, segment]
            for s in range(size):
                t = start + s
                if corrected:
                    u[s] = ZERO
                    _add_rows(states[s], a[n, t, h], u[s])
                    _next_state(
                        states[s], w[n, t, h], k[n, t, h], v[n, t, h], b[n, t, h], u[s], True, states[s + 1]
                    )  # fmt: skip
                else:
                    _next_state(
                        states[s], w[n, t, h], k[n, t, h], v[n, t, h], k[n, t, h], u[s], False, states[s + 1]
                    )  # fmt: skip
            for s in range(size - 1, -1, -1):
                t = start + s
                _add_outer(grad, r[n, t, h], dy[n, t, h])
                dv[n, t, h] = ZERO
                _add_rows(grad, k[n, t, h], dv[n, t, h])
                if corrected:
                    du[:] = ZERO
                    _add_rows(grad, b[n, t, h], du)
                    _sums_over_values(
                        grad, states[s], states[s + 1], dy[n, t, h], v[n, t, h], u[s], du, True,
                        dr[n, t, h], dw[n, t, h], dk[n, t, h], da[n, t, h], db[n, t, h],
                    )  # fmt: skip
                    _previous_gradient(grad, w[n, t, h], a[n, t, h], du, True)
                else:
                    _sums_over_values(
                        grad, states[s], states[s + 1], dy[n, t, h], v[n, t, h], u[s], du, False,
                        dr[n, t, h], dw[n, t, h], dk[n, t, h], dr[n, t, h], dr[n, t, h],
                    )  # fmt: skip
                    _previous_gradient(grad, w[n, t, h], k[n, t, h], du, False)
        grad_state_BHVK[n, h] = grad.T


class NativeWKV7(torch.autograd.Function):
    """(y_BLHV, last state) in float32 with gradients for all inputs; a and b both None for the diagonal form."""

    @staticmethod
    def forward(ctx, r, log_w, k, v, a, b, state_BHVK):
        bound_numba_threads()
        B, L, H, K = r.shape
        V = v.shape[-1]
        r, k, v, state = (x.contiguous() for x in (r, k, v, state_BHVK))
        # torch's exp is vectorised, numba's is not.
        w = log_w.exp().contiguous()
        corrected = a is not None
        a, b = (x.contiguous() if corrected else r.new_empty(1, 1, 1, 1) for x in (a, b))
        keep = any(ctx.needs_input_grad)
        kept_PNKV = r.new_empty(B * H, -(-L // KEEP), K, V) if keep else r.new_empty(1, 1, 1, 1)
        y, last = torch.empty_like(v), torch.empty_like(state)
        arrays = [x.numpy() for x in (r, w, k, v, a, b)]
        results = (y.numpy(), last.numpy(), kept_PNKV.numpy())
        _forward(*arrays, corrected, state.numpy(), keep, *results)  # pyright: ignore[reportCallIssue]
        ctx.save_for_backward(r, w, k, v, a, b, kept_PNKV)
        ctx.corrected = corrected
        return y, last

    @staticmethod
    @differentiable_once
    def backward(ctx, *grad_outputs):
        r, w, k, v, a, b, kept_PNKV = ctx.saved_tensors
        dy, grad_last = (x.contiguous() for x in grad_outputs)
        dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in (r, w, k, v, a, b))
        grad_state = torch.empty_like(grad_last)
        arrays = [x.numpy() for x in (r, w, k, v, a, b)]
        arrivals = (kept_PNKV.numpy(), dy.numpy(), grad_last.numpy())
        results = [x.numpy() for x in (dr, dw, dk, dv, da, db, grad_state)]
        _backward(*arrays, ctx.corrected, *arrivals, *results)  # pyright: ignore[reportCallIssue]
        correction = (da, db) if ctx.corrected else (None, None)
        return dr, dw.mul_(w), dk, dv, *correction, grad_state


def wkv7_native(r, log_w, k, v, a, b, state_BHVK) -> tuple[Tensor, Tensor]:
    """y_BLHV and the state after the last token; float32 [B, L, H, D] on the CPU."""
    return NativeWKV7.apply(r, log_w, k, v, a, b, state_BHVK)  # pyright: ignore[reportReturnType]

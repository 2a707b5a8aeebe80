"""The WKV-7 recurrence in chunks of C tokens: the same sums, as a few matrix products per chunk (WY form).

Within a chunk let W_t = prod_{i<=t} w_i / M, with M the power of 2 nearest to the square root of prod_{i<=C} w_i, and
u_t = S_{t-1} a_t. Unrolling the recurrence gives

    S_t = (S_0 diag(M) + sum_{i<=t} u_i (b_i / W_i)^T + v_i (k_i / W_i)^T) diag(W_t)

so with a~_t = W_{t-1} a_t, r~_t = W_t r_t, b^_i = b_i / W_i, k^_i = k_i / W_i and the masks i<t (a) and i<=t (r)

    (I - a~ b^^T) U = a~ diag(M) S_0^T + (a~ k^^T) V          a unit lower triangular solve
    Y = r~ diag(M) S_0^T + (r~ b^^T) U + (r~ k^^T) V
    S_C = (S_0 diag(M) + U^T b^ + V^T k^) diag(W_C)

The solve is applied to a~ and (a~ k^^T) V, which do not depend on S_0: only three small products per chunk remain
sequential. W_i and 1/W_i are bounded by about exp(C max|log w| / 2), thanks to M with half the exponent; wkv7 refuses
what leaves values and gradients too little room beside it. A power of 2 rounds nothing: what a token gets does not
depend on later ones.

Shapes: B batch, L tokens, H heads, D key channels, V value channels, N chunks, C tokens of a chunk.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class _ScaledExp(torch.autograd.Function):
    """exp(x) scale. Its gradient is taken of the product: that of exp(x) alone could overflow."""

    @staticmethod
    def forward(ctx, x, scale):
        y = torch.exp(x) * scale
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0] * ctx.saved_tensors[0], None


def wkv7_chunk(r, log_w, k, v, a, b, state_BHVK, chunk_size: int) -> tuple[Tensor, Tensor]:
    """y_BLHV and the state after the last token; inputs [B, L, H, D], any L (padded to whole chunks inside).

    Without a and b the terms of U vanish, and with them the solve and half of the products.
    """
    L, D = r.shape[1], r.shape[-1]
    pad = -L % chunk_size

    def chunked(x):
        # Padding with zeros is neutral: log_w = 0 keeps the state, and k = a = 0 add nothing to it.
        x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
        return rearrange(x, "b (n c) h d -> b h n c d", c=chunk_size)

    r, log_w, k, v = (chunked(x) for x in (r, log_w, k, v))
    log_W = log_w.cumsum(-2)
    # No gradient goes to M: it cancels from every product, whatever it is.
    M = torch.exp2((log_W[..., -1:, :].detach() / (2.0 * math.log(2.0))).round())
    grow, shrink = _ScaledExp.apply(-log_W, M), _ScaledExp.apply(log_W, 1.0 / M)
    if a is None:
        last_W = _ScaledExp.apply(log_W[..., -1:, :], 1.0 / M)
        y, state = _diagonal(r * shrink, k * grow, v, M, last_W, state_BHVK)
        return rearrange(y, "b h n c v -> b (n c) h v")[:, :L], state
    a, b = chunked(a), chunked(b)
    queries = torch.cat([r * shrink, a * _ScaledExp.apply(log_W - log_w, 1.0 / M)], -2)
    keys = torch.cat([k * grow, b * grow], -2)
    scores = queries @ keys.mT
    C = chunk_size
    lower = torch.ones(C, C, dtype=torch.bool, device=r.device).tril()
    strict = lower.tril(-1)
    rk = scores[..., :C, :C].masked_fill(~lower, 0.0)
    rb = scores[..., :C, C:].masked_fill(~lower, 0.0)
    ak = scores[..., C:, :C].masked_fill(~strict, 0.0)
    ab = scores[..., C:, C:].masked_fill(~strict, 0.0)

    identity = torch.eye(C, dtype=r.dtype, device=r.device)
    right = torch.cat([queries[..., C:, :], ak @ v], -1)
    solved = torch.linalg.solve_triangular(identity - ab, right, upper=False, unitriangular=True)
    # Y = (r~ + rb P) diag(M) S_0^T + (rb Q + rk V) with U = P diag(M) S_0^T + Q.
    through_state = queries[..., :C, :] + rb @ solved[..., :D]
    within_chunk = rb @ solved[..., D:] + rk @ v
    last_W = _ScaledExp.apply(log_W[..., -1:, :], 1.0 / M)
    k_grown, b_grown = keys[..., :C, :], keys[..., C:, :]

    outputs = []
    state = state_BHVK
    for read, P, Q, y, b_n, vk, M_n, W_n in zip(
        through_state.unbind(2), solved[..., :D].unbind(2), solved[..., D:].unbind(2), within_chunk.unbind(2),
        b_grown.unbind(2), (v.mT @ k_grown).unbind(2), M.unbind(2), last_W.unbind(2), strict=True,
    ):  # fmt: skip
        state = state * M_n
        outputs.append(read @ state.mT + y)
        u = P @ state.mT + Q
        state = (state + u.mT @ b_n + vk) * W_n
    y = rearrange(torch.stack(outputs, 2), "b h n c v -> b (n c) h v")
    return y[:, :L], state


def _diagonal(r_shrunk, k_grown, v, M_BHN1K, last_W_BHN1K, state_BHVK) -> tuple[Tensor, Tensor]:
    """y [B, H, N, C, V] = r~ diag(M) S_0^T + (r~ k^^T) V and the last state of the recurrence without a and b."""
    within_chunk = (r_shrunk @ k_grown.mT).tril() @ v
    outputs = []
    state = state_BHVK
    for r_n, y, vk, M_n, W_n in zip(
        r_shrunk.unbind(2), within_chunk.unbind(2), (v.mT @ k_grown).unbind(2), M_BHN1K.unbind(2),
        last_W_BHN1K.unbind(2), strict=True,
    ):  # fmt: skip
        state = state * M_n
        outputs.append(r_n @ state.mT + y)
        state = (state + vk) * W_n
    return torch.stack(outputs, 2), state

"""The WKV-7 recurrence in chunks of C tokens: the same sums, as a few matrix products per chunk (WY form).

Within a chunk let W_t = prod_{i<=t} w_i and u_t = S_{t-1} a_t. Unrolling the recurrence gives

    S_t = (S_0 + sum_{i<=t} u_i (b_i / W_i)^T + v_i (k_i / W_i)^T) diag(W_t)

so with a~_t = W_{t-1} a_t, r~_t = W_t r_t, b^_i = b_i / W_i, k^_i = k_i / W_i and the masks i<t (a) and i<=t (r)

    (I - a~ b^^T) U = a~ S_0^T + (a~ k^^T) V          a unit lower triangular solve
    Y = r~ S_0^T + (r~ b^^T) U + (r~ k^^T) V
    S_C = (S_0 + U^T b^ + V^T k^) diag(W_C)

The solve is applied to a~ and (a~ k^^T) V, which do not depend on S_0: only three small products per chunk remain
sequential. 1/W_i is bounded by exp(C max|log w|), which must be representable; wkv7 refuses what is not.

Shapes: B batch, L tokens, H heads, D key channels, V value channels, N chunks, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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
    grow = torch.exp(-log_W)
    if a is None:
        y, state = _diagonal(r * torch.exp(log_W), k * grow, v, torch.exp(log_W[..., -1, :]), state_BHVK)
        return rearrange(y, "b h n c v -> b (n c) h v")[:, :L], state
    a, b = chunked(a), chunked(b)
    queries = torch.cat([r * torch.exp(log_W), a * torch.exp(log_W - log_w)], -2)
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
    # Y = (r~ + rb P) S_0^T + (rb Q + rk V) with U = P S_0^T + Q.
    through_state = queries[..., :C, :] + rb @ solved[..., :D]
    within_chunk = rb @ solved[..., D:] + rk @ v
    decay = torch.exp(log_W[..., -1, :])
    k_grown, b_grown = keys[..., :C, :], keys[..., C:, :]

    outputs = []
    state = state_BHVK
    for read, P, Q, y, b_n, vk, W in zip(
        through_state.unbind(2), solved[..., :D].unbind(2), solved[..., D:].unbind(2), within_chunk.unbind(2),
        b_grown.unbind(2), (v.mT @ k_grown).unbind(2), decay.unbind(2), strict=True,
    ):  # fmt: skip
        outputs.append(read @ state.mT + y)
        u = P @ state.mT + Q
        state = (state + u.mT @ b_n + vk) * W[..., None, :]
    y = rearrange(torch.stack(outputs, 2), "b h n c v -> b (n c) h v")
    return y[:, :L], state


def _diagonal(r_grown, k_shrunk, v, decay_BHNK, state_BHVK) -> tuple[Tensor, Tensor]:
    """y [B, H, N, C, V] = r~ S_0^T + (r~ k^^T) V and the last state of the recurrence without a and b."""
    within_chunk = (r_grown @ k_shrunk.mT).tril() @ v
    outputs = []
    state = state_BHVK
    for r_n, y, vk, W in zip(
        r_grown.unbind(2), within_chunk.unbind(2), (v.mT @ k_shrunk).unbind(2), decay_BHNK.unbind(2), strict=True
    ):
        outputs.append(r_n @ state.mT + y)
        state = (state + vk) * W[..., None, :]
    return torch.stack(outputs, 2), state

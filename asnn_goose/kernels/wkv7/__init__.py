"""The state recurrence of RWKV-7 (arXiv 2503.14456), with decay and a rank-one correction per token.

    S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t

r, log_w, k, v, a, b are [B, L, H, D]; the state is [B, H, D_v, D_k]: rows are values, columns are keys.
"""

import logging
import math
from functools import cache

import torch
from torch import Tensor

from asnn_goose.kernels.wkv7.reference import wkv7_reference, wkv7_step
from asnn_goose.kernels.wkv7.torch_chunk import wkv7_chunk

__all__ = ["LOG_W_MIN", "wkv7", "wkv7_step"]

_log = logging.getLogger(__name__)

LOG_W_MIN = -math.exp(-0.5)
"""RWKV-7's decay is exp(-exp(-1/2) sigmoid(.)), so log_w never falls below -0.6065."""

_LARGEST_LOG = {torch.float32: 80.0, torch.float64: 700.0}


@cache
def _log_choice(backend: str) -> None:
    _log.info("wkv7: backend %s", backend)


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs y_BLHD and the state after the last token, in float32 (float64 for float64 input).

    Args:
        r, k, v: receptance, key and value, [B, L, H, D].
        log_w: logarithm of the decay, <= 0.
        a, b: vectors of the rank-one correction (RWKV-7: -kappa and kappa times the in-context rate).
        state: [B, H, D_v, D_k] before the first token; None: 0.
        chunk_size: tokens per chunk of ``torch_chunk``.
        backend: reference (token by token), torch_chunk, or auto (torch_chunk from 8 tokens on).

    Raises:
        ValueError: for unequal shapes, no tokens, integer input, chunk_size < 1, an unknown backend, or a decay so
            strong that its inverse over one chunk cannot be represented (only the value furthest from 0 is looked at).
    """
    if r.ndim != 4 or any(x.shape != r.shape for x in (log_w, k, a, b)) or v.shape[:3] != r.shape[:3]:
        shapes = [tuple(x.shape) for x in (r, log_w, k, v, a, b)]
        raise ValueError(f"r, log_w, k, v, a, b must be [B, L, H, D] and of equal shape, not {shapes}")
    if 0 in v.shape or 0 in r.shape:
        raise ValueError(f"wkv7 takes at least one token, head and channel, not {tuple(r.shape)}")
    for x in (r, log_w, k, v, a, b):
        if not x.is_floating_point():
            raise ValueError(f"wkv7 takes floating-point tensors, not {x.dtype}")
    state_shape = (r.shape[0], r.shape[2], v.shape[-1], r.shape[-1])
    if state is not None and state.shape != state_shape:
        raise ValueError(f"state must be [B, H, D_v, D_k] = {state_shape}, not {tuple(state.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if backend not in ("auto", "reference", "torch_chunk"):
        raise ValueError(f"wkv7 backend must be auto, reference or torch_chunk, not {backend!r}")
    if backend == "auto":
        backend = "torch_chunk" if r.shape[1] >= 8 else "reference"
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    r, log_w, k, v, a, b = (x.to(dtype) for x in (r, log_w, k, v, a, b))
    state = r.new_zeros(state_shape) if state is None else state.to(dtype)
    _log_choice(backend)
    # Autocast would round the state and its products to bfloat16.
    with torch.autocast(r.device.type, enabled=False):
        if backend == "reference":
            return wkv7_reference(r, log_w, k, v, a, b, state)
        chunk_size = min(chunk_size, r.shape[1])
        largest = log_w.detach().abs().max().item()
        if largest * chunk_size > _LARGEST_LOG[dtype]:
            raise ValueError(
                f"|log_w| reaches {largest:.3g}, which over chunk_size {chunk_size} overflows {dtype}: "
                f"use a chunk_size of at most {max(1, int(_LARGEST_LOG[dtype] / largest))} or backend reference"
            )
        return wkv7_chunk(r, log_w, k, v, a, b, state, chunk_size)

"""The state recurrence of RWKV-7 (arXiv 2503.14456), with decay and a rank-one correction per token.

    S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t

r, log_w, k, v, a, b are [B, L, H, D]; the state is [B, H, D_v, D_k]: rows are values, columns are keys.
"""

import math
from numbers import Integral

import torch
from torch import Tensor

from asnn_goose.kernels.backend import HALF, Backend, choose, log_choice
from asnn_goose.kernels.precision import wide_dtype
from asnn_goose.kernels.untraced import untraced
from asnn_goose.kernels.wkv7.reference import wkv7_reference, wkv7_step
from asnn_goose.kernels.wkv7.torch_chunk import wkv7_chunk

__all__ = ["BACKENDS", "LOG_W_MIN", "wkv7", "wkv7_step"]

LOG_W_MIN = -math.exp(-0.5)
"""RWKV-7's decay is exp(-exp(-1/2) sigmoid(.)), so log_w never falls below -0.6065."""

_LARGEST_LOG = {torch.float32: 80.0, torch.float64: 700.0}
"""Of C max|log_w|. ``torch_chunk`` holds exp of half of it, and as much again is left to values and gradients."""
_SHORT = 8


def _fla_cannot(*, diagonal: bool, key_size: int, value_size: int, **_) -> str | None:
    if diagonal:
        return "always has the correction a b^T"
    if key_size != value_size:
        return f"takes keys and values of one size, not {key_size} and {value_size}"
    return None


BACKENDS = (
    Backend("native", ("cpu",), (*HALF, torch.float32), package="numba"),
    Backend("fla", ("cuda",), (*HALF, torch.float32), package="fla", unless=_fla_cannot),
    Backend("torch_chunk"),
    # Below a handful of tokens a chunk costs more than it saves: auto takes the loop there.
    Backend("reference", automatic=False),
)


def wkv7_backend(
    backend: str, device: torch.device, dtype: torch.dtype, *, tokens: int, diagonal: bool = False,
    key_size: int = 64, value_size: int = 64,
) -> str:  # fmt: skip
    """The form that ``wkv7`` will run for such input; raises ValueError if a named one cannot."""
    if backend == "auto" and tokens < _SHORT:
        return "reference"
    # fla rounds the factors of float32 products to TF32: float32 goes there only where it is asked for by name.
    backends = [form for form in BACKENDS if backend != "auto" or form.name != "fla" or dtype in HALF]
    options = {"diagonal": diagonal, "key_size": key_size, "value_size": value_size}
    return choose("wkv7", backends, backend, device=device, dtype=dtype, **options)


@untraced
def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    state: Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs y_BLHV and the state after the last token, in float32 (float64 for float64 input).

    The dtype of r is that of the input: the other tensors are turned into what the form works in for it, float64 for
    float64 and float32 for the rest (fla: r's own).

    Args:
        r, k, v: receptance, key and value, [B, L, H, D].
        log_w: logarithm of the decay, <= 0.
        a, b: vectors of the rank-one correction (RWKV-7: -kappa and kappa times the in-context rate); both None: none,
            the diagonal form, at about half the cost.
        state: [B, H, D_v, D_k] before the first token; None: 0.
        chunk_size: tokens per chunk of ``torch_chunk``.
        backend: reference (token by token), torch_chunk, native (numba; CPU, float32 and narrower), fla
            (flash-linear-attention; CUDA, float32, in whose products it rounds to TF32, and narrower, an optional
            extra) or auto: the reference below 8 tokens; else native on the CPU for float32 and narrower, fla on CUDA
            for half precision where it is installed and has the form, and torch_chunk for all the rest, in chunks as
            short as the decay asks for, below 8 tokens the reference.

    Raises:
        ValueError: for unequal shapes, no tokens, integer input, a chunk_size that is no whole number of at least 1, an
            unknown backend or one that cannot run here, or, where torch_chunk was asked for by name, a decay so strong
            that over one chunk its inverse, or what values and gradients make of it, could not be represented (only the
            value furthest from 0 is looked at).
    """
    if (a is None) != (b is None):
        raise ValueError("a and b are given together or not at all")
    six = [x for x in (r, log_w, k, v, a, b) if x is not None]
    alike = [x for x in (log_w, k, a, b) if x is not None]
    if r.ndim != 4 or v.ndim != 4 or any(x.shape != r.shape for x in alike) or v.shape[:3] != r.shape[:3]:
        shapes = [tuple(x.shape) for x in six]
        raise ValueError(f"r, log_w, k, v, a, b must be [B, L, H, D] and of equal shape, not {shapes}")
    if 0 in v.shape[1:] or 0 in r.shape[1:]:
        raise ValueError(f"wkv7 takes at least one token, head and channel, not {tuple(r.shape)}")
    for x in six:
        if not x.is_floating_point():
            raise ValueError(f"wkv7 takes floating-point tensors, not {x.dtype}")
    state_shape = (r.shape[0], r.shape[2], v.shape[-1], r.shape[-1])
    if state is not None and state.shape != state_shape:
        raise ValueError(f"state must be [B, H, D_v, D_k] = {state_shape}, not {tuple(state.shape)}")
    if not isinstance(chunk_size, Integral) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, not {chunk_size}")
    choice = wkv7_backend(
        backend, r.device, r.dtype,
        tokens=r.shape[1], diagonal=a is None, key_size=r.shape[-1], value_size=v.shape[-1],
    )  # fmt: skip
    log_choice("wkv7", choice)
    # Nothing to compute: the plain form gives results and gradients their shapes, and the others want elements.
    if r.shape[0] == 0:
        choice = "reference"
    dtype = wide_dtype(r.dtype)
    if choice == "fla":
        from asnn_goose.kernels.wkv7.fla import wkv7_fla

        return wkv7_fla(r, log_w, k, v, a, b, state)
    r, log_w, k, v = (x.to(dtype) for x in (r, log_w, k, v))
    a, b = (None if x is None else x.to(dtype) for x in (a, b))
    state = r.new_zeros(state_shape) if state is None else state.to(dtype)
    # Autocast would round the state and its products to bfloat16.
    with torch.autocast(r.device.type, enabled=False):
        if choice == "native":
            from asnn_goose.kernels.wkv7.native import wkv7_native

            return wkv7_native(r, log_w, k, v, a, b, state)
        if choice == "reference":
            return wkv7_reference(r, log_w, k, v, a, b, state)
        chunk_size = min(chunk_size, r.shape[1])
        largest = log_w.detach().abs().max().item()
        if largest * chunk_size > _LARGEST_LOG[dtype]:
            fits = int(_LARGEST_LOG[dtype] / largest)
            if backend != "auto":
                raise ValueError(
                    f"|log_w| reaches {largest:.3g}, which over chunk_size {chunk_size} may overflow {dtype}: use "
                    f"{f'a chunk_size of at most {fits} or ' if fits else ''}another backend"
                )
            if fits < _SHORT:
                return wkv7_reference(r, log_w, k, v, a, b, state)
            chunk_size = fits
        return wkv7_chunk(r, log_w, k, v, a, b, state, chunk_size)

"""The WKV-7 recurrence on CUDA through flash-linear-attention's chunked kernels (the optional package fla-core)."""

from torch import Tensor


def wkv7_fla(r, log_w, k, v, a, b, state_BHVK: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_BLHV and the state after the last token, in float32; inputs [B, L, H, D] on a CUDA device.

    fla's state has key rows and value columns, ours the other way round; its ``scale`` multiplies r.
    """
    from fla.ops.rwkv7 import chunk_rwkv7  # pyright: ignore[reportMissingImports]

    initial_BHKV = None if state_BHVK is None else state_BHVK.float().mT.contiguous()
    log_w, k, v, a, b = (x.to(r.dtype) for x in (log_w, k, v, a, b))
    y, last_BHKV = chunk_rwkv7(
        r, log_w, k, v, a, b, scale=1.0, initial_state=initial_BHKV, output_final_state=True
    )  # fmt: skip
    return y.float(), last_BHKV.mT

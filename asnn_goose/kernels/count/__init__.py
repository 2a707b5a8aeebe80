"""Whole numbers of spikes at once: a quantiser with a straight-through gradient behind a gain.

    gain = theta m,   m = mean_c |x_c| of each token (1 without ``per_token``),   u = x / gain
    s    = k / N,     k = sign(u) floor(N min(|u|, 1) + offset),   0 where |x| / m < silence
    ds/du = [|u| <= 1]

so that x is about s * gain. The gradient goes on to x, to theta and through m. Count and gradient are I-LIF's (arXiv
2407.20708); which spikes a count stands for is the neuron's matter (models/spiking.py).
"""

import torch
from torch import Tensor

from asnn_goose.kernels.backend import HALF, Backend, choose, log_choice
from asnn_goose.kernels.count.fused import FusedCount, Rounding
from asnn_goose.kernels.count.reference import count_reference, token_scale
from asnn_goose.kernels.precision import wide_dtype
from asnn_goose.kernels.untraced import untraced

__all__ = ["BACKENDS", "count", "count_backend", "token_scale"]

BACKENDS = (
    Backend("numba", ("cpu",), (*HALF, torch.float32), package="numba"),
    Backend("triton", ("cuda",), (*HALF, torch.float32), package="triton"),
    Backend("reference"),
)


def count_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The form that :func:`count` will run for such input; raises ValueError if a named one cannot."""
    return choose("count", BACKENDS, backend, device=device, dtype=dtype)


@untraced
def count(
    current_xC: Tensor,
    levels: int,
    *,
    threshold: Tensor,
    per_token: bool = True,
    offset: float = 0.0,
    silence: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(s, gain) of the module's formulas, in float32 (float64 for float64 input).

    Args:
        current_xC: x, analog.
        levels: N >= 1; s lies on k / N, |k| <= N.
        threshold: theta > 0, finite, scalar or [C], differentiable, in units of x / m.
        per_token: whether m is each token's mean |x| or 1.
        offset: in [0, 1): 0 rounds towards 0, 1/2 to the nearest.
        silence: scalar in units of x / m, not differentiated; None: 0.
        backend: numba (CPU) or triton (CUDA) for float32 and narrower, reference (anywhere, any dtype), or auto: the
            first of them that can run.

    Returns:
        s_xC and the gain, which broadcasts against it: [..., 1], or [..., C] for a threshold per channel; theta, in
        that dtype, without ``per_token``.

    Raises:
        ValueError: levels that are no whole number or, as the offset, out of range; no channels; a threshold or a
            silence of another shape, or a threshold that is not above 0 and finite; or a named backend that cannot run
            here.
    """
    if not isinstance(levels, int) or levels < 1:
        raise ValueError(f"levels must be a whole number of at least 1, not {levels}")
    if not 0.0 <= offset < 1.0:
        raise ValueError(f"offset must lie in [0, 1), not {offset}")
    if current_xC.ndim < 1:
        raise ValueError("current must have channels, not be one number")
    if current_xC.shape[-1] == 0:
        raise ValueError(f"current must have at least one channel, not shape {tuple(current_xC.shape)}")
    dtype = wide_dtype(current_xC.dtype)
    threshold = torch.as_tensor(threshold, dtype=dtype, device=current_xC.device)
    if threshold.ndim > 1 or threshold.numel() not in (1, current_xC.shape[-1]):
        raise ValueError(
            f"threshold must be one number or one per channel ({current_xC.shape[-1]}), not {tuple(threshold.shape)}"
        )
    fits = (threshold > 0) & threshold.isfinite()
    if not bool(fits.all()):
        raise ValueError(f"threshold must be above 0 and finite, not {threshold[~fits][0].item()}")
    if silence is not None and silence.ndim > 0:
        raise ValueError(f"silence must be one number for all channels, not of shape {tuple(silence.shape)}")
    choice = count_backend(backend, current_xC.device, current_xC.dtype)
    log_choice("count", choice)
    wide = current_xC.to(dtype)
    # In units of u, which is what is compared.
    silence = None if silence is None else silence.to(dtype) / threshold.detach()
    if choice == "reference":
        return count_reference(wide, levels, threshold, per_token, offset, silence)
    if choice == "numba":
        from asnn_goose.kernels.count import native as form
    else:
        from asnn_goose.kernels.count import triton as form
    rounding = Rounding(levels, per_token, offset)
    s, scale = FusedCount.apply(wide, threshold, silence, rounding, form)  # pyright: ignore[reportGeneralTypeIssues]
    return s, threshold * scale if per_token else threshold

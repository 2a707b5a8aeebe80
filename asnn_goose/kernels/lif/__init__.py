"""Leaky integrate-and-fire over a leading time axis, and its mean spike under constant current.

    v_t = decay v_{t-1} + x_t
    s_t = sign(v_t) [|v_t| >= theta]   (ternary)      [v_t >= theta]   (binary)
    v_t <- v_t - theta s_t   (soft reset)             v_t (1 - |s_t|)  (hard reset)

The spike's derivative is a surrogate g(u), u = |v| - theta (ternary) or v - theta (binary): ds/dv = g(u) and
ds/dtheta = -sign(v) g(u); see surrogate.py for the shapes. State is float32 for half-precision input. A membrane that
is NaN has a spike of NaN. An infinite one is reset to 0 by a hard reset, but its gradient with ``detach_reset`` false,
and in the reference its state too, is NaN.
"""

from numbers import Integral

import torch
from torch import Tensor

from asnn_goose.kernels.backend import HALF, Backend, choose, log_choice
from asnn_goose.kernels.lif import peers
from asnn_goose.kernels.lif.fused import Dynamics, FusedLIF
from asnn_goose.kernels.lif.reference import lif_rate_reference, lif_reference
from asnn_goose.kernels.lif.surrogate import DEFAULT_WIDTH
from asnn_goose.kernels.precision import wide_dtype
from asnn_goose.kernels.untraced import untraced

BACKENDS = (
    Backend("numba", ("cpu",), (*HALF, torch.float32), package="numba"),
    Backend("triton", ("cuda",), (*HALF, torch.float32), package="triton"),
    Backend("reference"),
    Backend("spikingjelly", package="spikingjelly", automatic=False, unless=peers.spikingjelly_obstacle),
    Backend("snntorch", package="snntorch", automatic=False, unless=peers.snntorch_obstacle),
)


def lif_backend(backend: str, device: torch.device, dtype: torch.dtype, **options) -> str:
    """The form that ``lif`` and ``lif_rate`` will run for such input; raises ValueError if a named one cannot.

    ``options`` are those of :func:`lif`; without them only device, dtype and installation are looked at.
    """
    return choose("lif", BACKENDS, backend, device=device, dtype=dtype, **options)


def _checked(
    current: Tensor, step_shape, steps, mean, threshold, decay, kind, reset, detach_reset, surrogate, width, v0
) -> tuple[Tensor, Tensor, Tensor | None, Dynamics]:  # fmt: skip
    """threshold, decay and v0 in the dtype of the state, and the rest."""
    if not current.is_floating_point():
        raise ValueError(f"current must be floating point, not {current.dtype}")
    if kind not in ("ternary", "binary"):
        raise ValueError(f"kind must be ternary or binary, not {kind!r}")
    if reset not in ("soft", "hard"):
        raise ValueError(f"reset must be soft or hard, not {reset!r}")
    if surrogate not in DEFAULT_WIDTH:
        raise ValueError(f"surrogate must be one of {sorted(DEFAULT_WIDTH)}, not {surrogate!r}")
    try:
        width = DEFAULT_WIDTH[surrogate] if width is None else float(width)
    except (TypeError, ValueError, RuntimeError):
        shown = tuple(width.shape) if isinstance(width, Tensor) else repr(width)
        raise ValueError(f"width must be one number above 0, not {shown}") from None
    if not width > 0:
        raise ValueError(f"width must be above 0, not {width}")
    dtype = wide_dtype(current.dtype)
    threshold = torch.as_tensor(threshold, dtype=dtype, device=current.device)
    decay = torch.as_tensor(decay, dtype=dtype, device=current.device)
    fits = (threshold > 0) & threshold.isfinite()
    if not bool(fits.all()):
        raise ValueError(f"threshold must be above 0 and finite, not {threshold[~fits][0].item()}")
    if not bool(((decay >= 0) & (decay <= 1)).all()):
        raise ValueError(f"decay must lie in [0, 1], not {decay.min().item()} to {decay.max().item()}")
    for name, value in (("threshold", threshold), ("decay", decay)):
        if value.ndim > 1 or value.numel() not in (1, step_shape[-1]):
            raise ValueError(
                f"{name} must be one number or one per channel ({step_shape[-1]}), not {tuple(value.shape)}"
            )
    if v0 is not None and v0.shape != step_shape:
        raise ValueError(f"v0 must have the shape of one step, {tuple(step_shape)}, not {tuple(v0.shape)}")
    v0 = None if v0 is None else v0.to(dtype)
    return threshold, decay, v0, Dynamics(steps, mean, kind, reset, detach_reset, surrogate, width)


def _run(op: str, current, threshold, decay, v0, dynamics: Dynamics, backend: str) -> tuple[Tensor, Tensor | None]:
    """(spikes or their mean, last membrane) in the form that ``backend`` comes to."""
    choice = lif_backend(
        backend, current.device, current.dtype, threshold=threshold, decay=decay, v0=v0, **dynamics._asdict()
    )
    log_choice(op, choice)
    # Nothing to compute: the plain form gives results and gradients their shapes, and the compiled ones want elements.
    if current.numel() == 0:
        choice = "reference"
    if choice in ("numba", "triton"):
        if choice == "numba":
            from asnn_goose.kernels.lif import native as form
        else:
            from asnn_goose.kernels.lif import triton as form
        return FusedLIF.apply(current, threshold, decay, v0, dynamics, form)  # pyright: ignore[reportReturnType]
    wide = current.to(threshold.dtype)
    if choice == "reference" and dynamics.mean:
        return lif_rate_reference(wide, threshold, decay, v0, dynamics), None
    currents = wide.expand(dynamics.steps, *wide.shape) if dynamics.mean else wide
    if choice == "reference":
        spikes, v = lif_reference(currents, threshold, decay, v0, dynamics)
    elif choice == "spikingjelly":
        spikes, v = peers.spikingjelly_lif(currents, threshold, decay, dynamics)
    else:
        spikes, v = peers.snntorch_lif(currents, threshold, decay, dynamics)
    return (spikes.mean(0), None) if dynamics.mean else (spikes.to(current.dtype), v)


@untraced
def lif(
    current_TxC: Tensor,
    *,
    threshold,
    decay,
    kind: str = "ternary",
    reset: str = "soft",
    detach_reset: bool = True,
    surrogate: str = "atan",
    width: float | None = None,
    v0: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Spikes in {-1, 0, 1} (ternary) or {0, 1} (binary) for every micro-step, and the membrane after the last reset.

    Args:
        current_TxC: input currents, time first.
        threshold: theta > 0, finite, number or tensor, one for all or [C], differentiable.
        decay: beta in [0, 1], number or tensor, one for all or [C], differentiable.
        kind, reset, surrogate: see the module.
        detach_reset: whether the gradient ignores the path through the reset.
        width: of the surrogate, in units of v; None: the shape's default.
        v0: membrane before the first step, shape of one step; None: 0.
        backend: numba (CPU) or triton (CUDA) for float32 and narrower, reference (anywhere, any dtype), spikingjelly or
            snntorch (their neurons in our place, see peers.py), or auto: the first of numba, triton and reference
            that can run.

    Returns:
        (spikes_TxC in the current's dtype, v_xC in float64 for float64 input, else float32).

    Raises:
        ValueError: a wrong rank, shape, dtype, name or number, or a named backend that cannot run here.
    """
    if current_TxC.ndim < 2:
        raise ValueError(f"current must have a time axis and channels, not shape {tuple(current_TxC.shape)}")
    if current_TxC.shape[0] == 0:
        raise ValueError("current must have at least one micro-step")
    checked = _checked(
        current_TxC, current_TxC.shape[1:], current_TxC.shape[0], False,
        threshold, decay, kind, reset, detach_reset, surrogate, width, v0,
    )  # fmt: skip
    spikes, v = _run("lif", current_TxC, *checked, backend)
    assert v is not None
    return spikes, v


@untraced
def lif_rate(
    current_xC: Tensor,
    steps: int,
    *,
    threshold,
    decay,
    kind: str = "ternary",
    reset: str = "soft",
    detach_reset: bool = True,
    surrogate: str = "atan",
    width: float | None = None,
    v0: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over ``steps`` micro-steps of the spikes that one constant current causes; no time axis is materialised.

    Equals ``lif(current.expand(steps, ...), ...)[0].mean(0)``, in float32 (float64 for float64 input). Arguments as for
    :func:`lif`; its peers do materialise the time axis. The mean lies on the levels k / steps: 2 steps + 1 of them, or
    steps + 1 for binary.
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps}")
    if current_xC.ndim < 1:
        raise ValueError("current must have channels, not be one number")
    checked = _checked(
        current_xC, current_xC.shape, steps, True,
        threshold, decay, kind, reset, detach_reset, surrogate, width, v0,
    )  # fmt: skip
    return _run("lif_rate", current_xC, *checked, backend)[0]

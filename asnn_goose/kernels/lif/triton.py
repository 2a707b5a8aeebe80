"""lif and lif_rate on a GPU through Triton: a program takes a tile of rows x channels and walks the time axis.

Forward reads each current and writes each spike once. Backward walks forward again and keeps the membrane before every
SEGMENT-th micro-step; then, from the last segment to the first, it charges SEGMENT micro-steps again in registers and
goes back over them. Launched without fused multiply-add, which would round differently from the reference and flip
spikes at the threshold.

Shapes: T micro-steps, S stored steps, N rows, C channels (see fused.py); P programs along the rows.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# Pyright knows nothing of Triton's language, and may take "import triton" for this very file.

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from asnn_goose.kernels.lif.fused import Dynamics, Gradients, Inputs
from asnn_goose.kernels.lif.surrogate import CODES

TILE = 1024
SEGMENT = 8


@triton.jit
def _tile(N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(place of each element in an [N, C] array, whether it exists, columns, row block)."""
    blocks = tl.cdiv(C, COLUMNS)
    row_block = tl.program_id(0) // blocks
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    place = rows[:, None].to(tl.int64) * C + columns[None, :]
    inside = (rows[:, None] < N) & (columns[None, :] < C)
    return place, inside, columns, row_block


@triton.jit
def _parameters(threshold, decay, columns, C, THRESHOLD_STRIDE: tl.constexpr, DECAY_STRIDE: tl.constexpr):
    """(theta, beta) of a tile's columns, [1, COLUMNS]; a stride of 0 reads one value for all."""
    theta = tl.load(threshold + columns * THRESHOLD_STRIDE, mask=columns < C, other=1.0)[None, :]
    beta = tl.load(decay + columns * DECAY_STRIDE, mask=columns < C, other=0.0)[None, :]
    return theta, beta


@triton.jit
def _fire(u, theta, TERNARY: tl.constexpr):
    s = (u >= theta).to(tl.float32)
    if TERNARY:
        s -= (u <= -theta).to(tl.float32)
    return s


@triton.jit
def _reset(u, s, theta, SOFT: tl.constexpr):
    if SOFT:
        return u - theta * s
    return tl.where(s != 0.0, 0.0, u)


@triton.jit
def _derivative(distance, width, SHAPE: tl.constexpr):
    """g(u) of surrogate.py at the membrane's distance from the threshold."""
    if SHAPE == 0:
        z = distance * (3.141592653589793 / width)
        return 1.0 / (width * (1.0 + z * z))
    elif SHAPE == 1:
        return tl.maximum(1.0 - tl.abs(distance) / width, 0.0) / width
    elif SHAPE == 2:
        e = tl.exp(-tl.abs(distance) / width)
        return e / ((1.0 + e) * (1.0 + e)) / width
    elif SHAPE == 3:
        z = 1.0 + tl.abs(distance) / width
        return 1.0 / (width * z * z)
    else:
        return tl.where(tl.abs(distance) <= 0.5 * width, 1.0 / width, 0.0)


@triton.jit
def _forward_kernel(
    x, threshold, decay, v0, spikes, v_last, N, C, T,
    THRESHOLD_STRIDE: tl.constexpr, DECAY_STRIDE: tl.constexpr, HAS_V0: tl.constexpr, MEAN: tl.constexpr,
    TERNARY: tl.constexpr, SOFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place, inside, columns, _ = _tile(N, C, ROWS, COLUMNS)
    # Of an N of 1 the JIT makes a plain Python number, which has no methods.
    step = tl.cast(N, tl.int64) * C
    theta, beta = _parameters(threshold, decay, columns, C, THRESHOLD_STRIDE, DECAY_STRIDE)
    v = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_V0:
        v = tl.load(v0 + place, mask=inside, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    constant = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    for t in range(T):
        current = constant
        if not MEAN:
            current = tl.load(x + t * step + place, mask=inside, other=0.0).to(tl.float32)
        u = beta * v + current
        s = _fire(u, theta, TERNARY)
        v = _reset(u, s, theta, SOFT)
        s = tl.where(u != u, u, s)
        if MEAN:
            total += s
        else:
            tl.store(spikes + t * step + place, s.to(spikes.dtype.element_ty), mask=inside)
    if MEAN:
        tl.store(spikes + place, tl.div_rn(total, tl.zeros_like(total) + T), mask=inside)
    else:
        tl.store(v_last + place, v, mask=inside)


@triton.jit
def _backward_kernel(
    x, threshold, decay, v0, grad_spikes, grad_last, kept, grad_x, grad_v0, grad_threshold, grad_decay, N, C, T,
    segments, width,
    THRESHOLD_STRIDE: tl.constexpr, DECAY_STRIDE: tl.constexpr, HAS_V0: tl.constexpr, HAS_SPIKES: tl.constexpr,
    HAS_LAST: tl.constexpr, MEAN: tl.constexpr, TERNARY: tl.constexpr, SOFT: tl.constexpr, ATTACHED: tl.constexpr,
    PARAMETERS: tl.constexpr, SHAPE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place, inside, columns, row_block = _tile(N, C, ROWS, COLUMNS)
    step = tl.cast(N, tl.int64) * C
    theta, beta = _parameters(threshold, decay, columns, C, THRESHOLD_STRIDE, DECAY_STRIDE)
    zero = tl.zeros((ROWS, COLUMNS), tl.float32)
    constant = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    v = zero
    if HAS_V0:
        v = tl.load(v0 + place, mask=inside, other=0.0)
    for segment in range(segments - 1):
        tl.store(kept + segment * step + place, v, mask=inside)
        for k in range(STEPS):
            current = constant
            if not MEAN:
                current = tl.load(x + (segment * STEPS + k) * step + place, mask=inside, other=0.0).to(tl.float32)
            u = beta * v + current
            v = _reset(u, _fire(u, theta, TERNARY), theta, SOFT)

    grad_v = zero
    if HAS_LAST:
        grad_v = tl.load(grad_last + place, mask=inside, other=0.0)
    grad_constant, grad_theta, grad_beta = zero, zero, zero
    grad_mean = zero
    if MEAN and HAS_SPIKES:
        grad_mean = tl.load(grad_spikes + place, mask=inside, other=0.0).to(tl.float32) / T
    for i in range(segments):
        segment = segments - 1 - i
        if i > 0:
            v = tl.load(kept + segment * step + place, mask=inside, other=0.0)
        before, charged = (), ()
        for k in tl.static_range(STEPS):
            t = segment * STEPS + k
            current = constant
            if not MEAN:
                current = tl.load(x + t * step + place, mask=inside & (t < T), other=0.0).to(tl.float32)
            u = beta * v + current
            before = before + (v,)  # noqa: RUF005 - Triton has no unpacking
            charged = charged + (u,)  # noqa: RUF005
            v = _reset(u, _fire(u, theta, TERNARY), theta, SOFT)
        for back in tl.static_range(STEPS):
            t = segment * STEPS + STEPS - 1 - back
            u = charged[STEPS - 1 - back]
            alive = inside & (t < T)
            grad_s = grad_mean
            if HAS_SPIKES and not MEAN:
                grad_s = tl.load(grad_spikes + t * step + place, mask=alive, other=0.0).to(tl.float32)
            s = _fire(u, theta, TERNARY)
            if TERNARY:
                sign = tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)
                slope = _derivative(tl.abs(u) - theta, width, SHAPE)
            else:
                sign = zero + 1.0
                slope = _derivative(u - theta, width, SHAPE)
            if ATTACHED:
                if SOFT:
                    grad_s -= grad_v * theta
                else:
                    grad_s -= grad_v * u * sign
            through_spike = slope * grad_s
            grad_u = grad_v + through_spike
            if not SOFT:
                grad_u = tl.where(s != 0.0, 0.0, grad_v) + through_spike
            to_theta = -sign * through_spike
            if ATTACHED and SOFT:
                to_theta -= s * grad_v
            grad_theta += tl.where(alive, to_theta, 0.0)
            grad_beta += tl.where(alive, grad_u * before[STEPS - 1 - back], 0.0)
            if MEAN:
                grad_constant += tl.where(alive, grad_u, 0.0)
            else:
                tl.store(grad_x + t * step + place, grad_u.to(grad_x.dtype.element_ty), mask=alive)
            grad_v = tl.where(t < T, grad_u * beta, grad_v)
    if MEAN:
        tl.store(grad_x + place, grad_constant.to(grad_x.dtype.element_ty), mask=inside)
    if HAS_V0:
        tl.store(grad_v0 + place, grad_v, mask=inside)
    # One partial sum per program: their order in the last sum is fixed.
    if PARAMETERS and THRESHOLD_STRIDE == 0:
        tl.store(grad_threshold + tl.program_id(0), tl.sum(grad_theta))
    if PARAMETERS and THRESHOLD_STRIDE == 1:
        tl.store(grad_threshold + row_block * C + columns, tl.sum(grad_theta, 0), mask=columns < C)
    if PARAMETERS and DECAY_STRIDE == 0:
        tl.store(grad_decay + tl.program_id(0), tl.sum(grad_beta))
    if PARAMETERS and DECAY_STRIDE == 1:
        tl.store(grad_decay + row_block * C + columns, tl.sum(grad_beta, 0), mask=columns < C)


@cache
def _tuned(kernel):
    """The kernel with its number of warps chosen by measurement, once per shape; the interpreter cannot measure."""
    if triton.knobs.runtime.interpret:
        return kernel
    configs = [triton.Config({}, num_warps=warps) for warps in (1, 2, 4, 8)]
    return triton.autotune(configs, key=["N", "C", "T"])(kernel)


def _layout(inputs: Inputs) -> tuple[int, int, int, int, int]:
    """(N, C, rows and columns of a tile, row blocks); arrays without parameters per channel are one long row."""
    _, N, C = inputs.x_SNC.shape
    if inputs.threshold.numel() == 1 and inputs.decay.numel() == 1:
        N, C = 1, N * C
    columns = min(TILE, triton.next_power_of_2(C))
    rows = max(1, min(TILE // columns, triton.next_power_of_2(N)))
    return N, C, rows, columns, triton.cdiv(N, rows)


def _flags(inputs: Inputs, dynamics: Dynamics) -> dict[str, bool | int]:
    return {
        "THRESHOLD_STRIDE": int(inputs.threshold.numel() > 1),
        "DECAY_STRIDE": int(inputs.decay.numel() > 1),
        "HAS_V0": inputs.v0_NC is not None,
        "MEAN": dynamics.mean,
        "TERNARY": dynamics.kind == "ternary",
        "SOFT": dynamics.reset == "soft",
    }


def forward(inputs: Inputs, dynamics: Dynamics, spikes_SNC: Tensor, v_NC: Tensor | None) -> None:
    """Writes the spikes, or their mean, and the last membrane (None with ``mean``)."""
    x = inputs.x_SNC
    N, C, rows, columns, row_blocks = _layout(inputs)
    # Triton launches on the current device, wherever the tensors lie.
    with torch.cuda.device_of(x):
        # A pointer that a flag leaves unread may be any tensor.
        _tuned(_forward_kernel)[(triton.cdiv(C, columns) * row_blocks,)](
            x, inputs.threshold, inputs.decay, x if inputs.v0_NC is None else inputs.v0_NC, spikes_SNC,
            spikes_SNC if v_NC is None else v_NC, N, C, dynamics.steps, **_flags(inputs, dynamics),
            ROWS=rows, COLUMNS=columns, enable_fp_fusion=False,
        )  # fmt: skip


def backward(
    inputs: Inputs, dynamics: Dynamics, grad_spikes_SNC: Tensor | None, grad_v_NC: Tensor | None, parameters: bool
) -> Gradients:
    """Gradients of everything in ``inputs``; of threshold and decay only if ``parameters``, else 0."""
    x, v0 = inputs.x_SNC, inputs.v0_NC
    N, C, rows, columns, row_blocks = _layout(inputs)
    programs = triton.cdiv(C, columns) * row_blocks
    steps = min(SEGMENT, triton.next_power_of_2(dynamics.steps))
    segments = triton.cdiv(dynamics.steps, steps)
    kept = x.new_empty(segments - 1, N, C, dtype=torch.float32)
    grad_x = torch.empty_like(x)
    grad_v0 = None if v0 is None else torch.empty_like(v0)
    per_channel = (inputs.threshold.numel() > 1, inputs.decay.numel() > 1)
    new = x.new_empty if parameters else x.new_zeros
    partial = [new((row_blocks, C) if wide else (programs, 1), dtype=torch.float32) for wide in per_channel]
    with torch.cuda.device_of(x):
        _tuned(_backward_kernel)[(programs,)](
            x, inputs.threshold, inputs.decay, x if v0 is None else v0,
            x if grad_spikes_SNC is None else grad_spikes_SNC, x if grad_v_NC is None else grad_v_NC, kept, grad_x,
            x if grad_v0 is None else grad_v0, *partial, N, C, dynamics.steps, segments, dynamics.width,
            **_flags(inputs, dynamics), HAS_SPIKES=grad_spikes_SNC is not None, HAS_LAST=grad_v_NC is not None,
            ATTACHED=not dynamics.detach_reset, PARAMETERS=parameters,
            SHAPE=CODES[dynamics.surrogate], STEPS=steps, ROWS=rows, COLUMNS=columns,
            enable_fp_fusion=False,
        )  # fmt: skip
    threshold, decay = (part.sum(0) for part in partial)
    return Gradients(grad_x, threshold, decay, grad_v0)

"""The count on a GPU through Triton: a program holds a token's channels in registers.

Forward reads each current once, for the token's scale and its counts. A program of backward walks TOKENS tokens, so
that its sum for theta is one partial result. Launched without fused multiply-add, which would round differently from
the reference and move counts at a tie.

Shapes: N tokens, C channels; P programs of backward.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# Pyright knows nothing of Triton's language, and may take "import triton" for this very file.

import torch
import triton
import triton.language as tl
from torch import Tensor

from asnn_goose.kernels.count.fused import Rounding
from asnn_goose.kernels.count.reference import SCALE_FLOOR

TOKENS = 16


@triton.jit
def _forward_kernel(
    x, threshold, silence, s, scale, C, levels, offset, floor,
    THRESHOLD_STRIDE: tl.constexpr, SILENCE_STRIDE: tl.constexpr, SILENT: tl.constexpr, PER_TOKEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < C
    x_C = tl.load(x + n * C + columns, mask=inside, other=0.0)
    m = 1.0
    if PER_TOKEN:
        mean = tl.div_rn(tl.sum(tl.abs(x_C)), tl.cast(C, tl.float32))
        # A mean that is not a number stays one.
        m = tl.where(mean < floor, floor, mean)
    theta_C = tl.load(threshold + columns * THRESHOLD_STRIDE, mask=inside, other=1.0)
    u_C = tl.div_rn(x_C, theta_C * m)
    size_C = tl.abs(u_C)
    k_C = tl.floor(tl.where(size_C > 1.0, 1.0, size_C) * levels + offset)
    if SILENT:
        k_C = tl.where(size_C < tl.load(silence + columns * SILENCE_STRIDE, mask=inside, other=0.0), 0.0, k_C)
    tl.store(s + n * C + columns, tl.div_rn(tl.where(u_C < 0.0, -k_C, k_C), tl.zeros_like(k_C) + levels), mask=inside)
    tl.store(scale + n, m)


@triton.jit
def _backward_kernel(
    x, grad_s, threshold, scale, grad_scale, grad_x, grad_theta, N, C, floor,
    THRESHOLD_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr, WALK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    inside = columns < C
    theta_C = tl.load(threshold + columns * THRESHOLD_STRIDE, mask=inside, other=1.0)
    total_C = tl.zeros((COLUMNS,), tl.float32)
    for i in range(WALK):
        n = tl.program_id(0).to(tl.int64) * WALK + i
        alive = inside & (n < N)
        x_C = tl.load(x + n * C + columns, mask=alive, other=0.0)
        m = tl.load(scale + n, mask=n < N, other=1.0)
        gain_C = theta_C * m
        u_C = tl.div_rn(x_C, gain_C)
        arriving_C = tl.load(grad_s + n * C + columns, mask=alive, other=0.0)
        within_C = tl.div_rn(tl.where(tl.abs(u_C) <= 1.0, arriving_C, 0.0), gain_C)
        at_gain_C = tl.where(alive, within_C * u_C, 0.0)
        total_C -= at_gain_C * m
        if PER_TOKEN:
            grad_m = tl.load(grad_scale + n, mask=n < N, other=0.0) - tl.sum(at_gain_C * theta_C)
            share = tl.where(m <= floor, 0.0, tl.div_rn(grad_m, tl.cast(C, tl.float32)))
            within_C += tl.where(x_C > 0.0, share, 0.0) - tl.where(x_C < 0.0, share, 0.0)
        tl.store(grad_x + n * C + columns, within_C, mask=alive)
    # One partial sum per program: their order in the last sum is fixed.
    tl.store(grad_theta + tl.program_id(0) * C + columns, total_C, mask=inside)


def _warps(columns: int) -> int:
    return min(8, max(1, columns // 256))


def forward(
    x_NC: Tensor, threshold: Tensor, silence: Tensor | None, rounding: Rounding, s_NC: Tensor, scale_N: Tensor
) -> None:
    """Writes s and each token's scale."""
    N, C = x_NC.shape
    if N:
        columns = triton.next_power_of_2(C)
        with torch.cuda.device_of(x_NC):
            # A pointer that a flag leaves unread may be any tensor.
            _forward_kernel[(N,)](
                x_NC, threshold, x_NC if silence is None else silence, s_NC, scale_N, C, float(rounding.levels),
                rounding.offset, SCALE_FLOOR, THRESHOLD_STRIDE=int(threshold.numel() > 1),
                SILENCE_STRIDE=int(silence is not None and silence.numel() > 1), SILENT=silence is not None,
                PER_TOKEN=rounding.per_token, COLUMNS=columns, num_warps=_warps(columns), enable_fp_fusion=False,
            )  # fmt: skip


def backward(
    x_NC: Tensor, grad_s_NC: Tensor, threshold: Tensor, scale_N: Tensor, grad_scale_N: Tensor, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """(grad_x_NC, gradient of theta per channel)."""
    N, C = x_NC.shape
    programs, columns = triton.cdiv(N, TOKENS), triton.next_power_of_2(C)
    grad_x_NC, grad_theta_PC = torch.empty_like(x_NC), x_NC.new_empty(programs, C)
    if N:
        with torch.cuda.device_of(x_NC):
            _backward_kernel[(programs,)](
                x_NC, grad_s_NC, threshold, scale_N, grad_scale_N, grad_x_NC, grad_theta_PC, N, C, SCALE_FLOOR,
                THRESHOLD_STRIDE=int(threshold.numel() > 1), PER_TOKEN=rounding.per_token, WALK=TOKENS, COLUMNS=columns,
                num_warps=_warps(columns), enable_fp_fusion=False,
            )  # fmt: skip
    return grad_x_NC, grad_theta_PC.sum(0)

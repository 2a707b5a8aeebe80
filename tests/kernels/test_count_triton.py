"""The Triton form of count: in Triton's interpreter against the reference, and compiled without a GPU.

conftest.py sets TRITON_INTERPRET before anything imports Triton; compilation happens in a process without it.
"""

import math

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.count.fused import FusedCount, Rounding
from asnn_goose.kernels.count.reference import count_reference


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results_and_gradients(form: str, x: Tensor, theta: Tensor, silence: Tensor | None, rounding: Rounding):
    """s, gain, and the gradients of a fixed weighted sum in the current and in theta."""
    x, theta = x.detach().clone().requires_grad_(), theta.detach().clone().requires_grad_()
    if form == "triton":
        from asnn_goose.kernels.count import triton

        s, scale = FusedCount.apply(x, theta, silence, rounding, triton)  # pyright: ignore[reportGeneralTypeIssues]
        gain = theta * scale if rounding.per_token else theta
    else:
        s, gain = count_reference(x, rounding.levels, theta, rounding.per_token, rounding.offset, silence)
    total = (s * numbers(*s.shape, seed=8)).sum() + (gain.expand(s.shape) * numbers(*s.shape, seed=9)).sum()
    return s.detach(), gain.detach(), *torch.autograd.grad(total, [x, theta])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("levels", "offset", "silent"), [(4, 0.0, True), (40, 0.5, False), (1, 0.25, False)])
def test_it_equals_the_reference(per_token: bool, per_channel: bool, levels: int, offset: float, silent: bool):
    """19 tokens are a whole walk of backward and a ragged one, 37 channels no power of two."""
    theta = numbers(37, seed=1).abs() + 0.5 if per_channel else torch.tensor(0.8)
    arguments = numbers(19, 37), theta, 0.3 / theta if silent else None, Rounding(levels, per_token, offset)
    arguments[0][3] = 0.0  # a token without any current
    found, wanted = results_and_gradients("triton", *arguments), results_and_gradients("reference", *arguments)
    assert 0.0 < (found[0] != 0).float().mean() < 1.0
    # The mean of a token is summed in another order; no u N + offset of these draws lies that close to a whole number.
    assert torch.equal(found[0], wanted[0])
    for ours, exact in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-5, atol=2e-6 * float(exact.abs().max()))


def test_what_is_read_from_a_view_is_the_views():
    x, theta = numbers(3, 5), numbers(10, seed=1).abs()[::2] + 0.5
    silence, rounding = numbers(5, 2, seed=2).abs()[:, 0], Rounding(4, True, 0.0)
    from asnn_goose.kernels.count import triton

    s, _ = FusedCount.apply(x, theta, silence, rounding, triton)  # pyright: ignore[reportGeneralTypeIssues]
    assert torch.equal(s, count_reference(x, 4, theta, True, 0.0, silence)[0])


def test_what_is_no_number_stays_none():
    x = numbers(3, 5)
    x[1, 2] = math.nan
    s, gain, grad_x, _ = results_and_gradients("triton", x, torch.tensor(1.0), None, Rounding(4, True, 0.0))
    wanted = torch.tensor([False, True, False])
    for found in (s, gain.expand(3, 5), grad_x):
        assert torch.equal(found.isnan().all(1), wanted) and torch.equal(found.isnan().any(1), wanted)


def test_kernels_compile_for_gpus_without_one(compiled):
    constants = {"THRESHOLD_STRIDE": 1, "SILENCE_STRIDE": 0, "SILENT": True, "PER_TOKEN": True, "WALK": 16}
    # The JIT passes an argument that is 1 as a constant.
    cases = ({"COLUMNS": 1024}, {"COLUMNS": 1, "N": 1, "C": 1})
    kernels = [(name, constants | case) for case in cases for name in ("_forward_kernel", "_backward_kernel")]
    types = dict.fromkeys(("N", "C"), "i32") | dict.fromkeys(("levels", "offset", "floor"), "fp32")
    lines = compiled("asnn_goose.kernels.count.triton", kernels, types, enable_fp_fusion=False)
    # A fused multiply-add would round |u| N + offset once instead of twice.
    assert lines == [f"{name} {capability} False" for name, _ in kernels for capability in (80, 90)]

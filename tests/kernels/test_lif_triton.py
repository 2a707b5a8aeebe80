"""The Triton form of lif: in Triton's interpreter against the reference, and compiled for GPUs that need not be there.

conftest.py sets TRITON_INTERPRET before anything imports Triton; compilation happens in a process without it.
"""

import itertools

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.lif import _checked, lif
from asnn_goose.kernels.lif.fused import FusedLIF

KINDS, RESETS = ("ternary", "binary"), ("soft", "hard")
SURROGATES = ("atan", "triangle", "sigmoid", "superspike", "rectangle")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results_and_gradients(form: str, current: Tensor, theta: Tensor, beta: Tensor, v0: Tensor | None, **options):
    """Spikes (or their mean), membrane, and the gradients of a fixed weighted sum in everything given."""
    mean = options.get("mean", False)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (current, theta, beta, v0)]
    x, threshold, decay, start = leaves
    assert x is not None
    settings = {"kind": "ternary", "reset": "soft", "detach_reset": True, "surrogate": "atan", "width": None} | options
    settings.pop("mean", None)
    steps = settings.pop("steps", x.shape[0])
    checked = _checked(x, x.shape if mean else x.shape[1:], steps, mean, threshold, decay, v0=start, **settings)
    if form == "triton":
        from asnn_goose.kernels.lif import triton

        spikes, v = FusedLIF.apply(x, *checked, triton)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        from asnn_goose.kernels.lif import _run

        spikes, v = _run("lif", x, *checked, form)
    total = (spikes.float() * numbers(*spikes.shape, seed=8)).sum()
    if v is not None:
        total = total + (v * numbers(*v.shape, seed=9)).sum()
    total.backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None]
    return [spikes.detach(), *([] if v is None else [v.detach()]), *grads]


def assert_alike(found: list[Tensor], wanted: list[Tensor], outputs: int, tolerance: float = 5e-6) -> None:
    for index, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        assert ours.dtype == exact.dtype
        if index < outputs:
            assert torch.equal(ours, exact)
        else:
            # The same operations; a sum over rows is added in another order.
            assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(("kind", "reset"), list(itertools.product(KINDS, RESETS)))
@pytest.mark.parametrize("per_channel", [True, False])
def test_time_axis_equals_the_reference(per_channel: bool, kind: str, reset: str, detach_reset: bool):
    """Ten micro-steps are a whole segment and a ragged one."""
    options = {"kind": kind, "reset": reset, "detach_reset": detach_reset, "width": 0.7}
    theta, beta = (
        (0.5 + numbers(5, seed=1).abs(), torch.rand(5)) if per_channel else (torch.tensor(0.8), torch.tensor(0.9))
    )
    arguments = (numbers(10, 3, 5), theta, beta, numbers(3, 5, seed=2) / 4)
    found = results_and_gradients("triton", *arguments, **options)
    assert_alike(found, results_and_gradients("numba", *arguments, **options), outputs=2)


def test_what_is_read_from_a_view_is_the_views():
    """A column of a matrix, every second entry, and one number that stands for all channels."""
    from asnn_goose.kernels.lif import triton

    x, column, every_second = numbers(10, 3, 5), torch.rand(5, 2)[:, 0] + 0.5, torch.rand(10)[::2]
    settings = {
        "kind": "ternary",
        "reset": "soft",
        "detach_reset": True,
        "surrogate": "atan",
        "width": None,
        "v0": None,
    }
    for theta in (column, column[:1].expand(5)):
        checked = _checked(x, (3, 5), 10, False, theta, every_second, **settings)
        found, _ = FusedLIF.apply(x, *checked, triton)  # pyright: ignore[reportGeneralTypeIssues]
        assert torch.equal(found, lif(x, threshold=theta, decay=every_second, kind="ternary", backend="reference")[0])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_rate_equals_the_reference_for_every_surrogate(surrogate: str):
    options = {"mean": True, "steps": 3, "surrogate": surrogate, "width": 0.6, "detach_reset": False}
    arguments = (numbers(4, 6), torch.tensor(0.7), torch.rand(6) / 2 + 0.5, None)
    found = results_and_gradients("triton", *arguments, **options)
    assert_alike(found, results_and_gradients("reference", *arguments, **options), outputs=1)


@pytest.mark.parametrize(
    ("N", "C", "per_channel"),
    [(5, 300, (True, True)), (2, 1100, (True, False)), (2, 1100, (False, True)), (2, 1100, (False, False))],
)
def test_several_programs_share_the_rows_and_the_channels(N: int, C: int, per_channel: tuple[bool, bool]):
    """Tiles of 1024: three blocks of rows, the last one half full, or two of channels; three of one long row."""
    theta = 0.5 + numbers(C, seed=1).abs() if per_channel[0] else torch.tensor(0.8)
    beta = numbers(C, seed=3).sigmoid() if per_channel[1] else torch.tensor(0.9)
    arguments = (numbers(3, N, C), theta, beta, numbers(N, C, seed=2) / 4)
    found = results_and_gradients("triton", *arguments, detach_reset=False)
    wanted = results_and_gradients("reference", *arguments, detach_reset=False)
    # One threshold for all sums thousands of terms of either sign, most of which cancel.
    assert_alike(found, wanted, outputs=2, tolerance=5e-5)


def test_bfloat16_spikes_with_a_float32_state():
    arguments = (numbers(4, 2, 8).bfloat16(), torch.tensor(0.6), torch.tensor(0.9), None)
    found = results_and_gradients("triton", *arguments)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    wanted = results_and_gradients("numba", *arguments)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[2:], wanted[2:], rtol=2**-7, atol=2**-9)


def test_spikes_at_the_threshold_and_beside_it():
    """A membrane exactly at theta fires, and its neighbour below does not."""
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    x = torch.stack([torch.tensor(1.0), below, -torch.tensor(1.0), -below]).expand(1, -1)
    spikes = results_and_gradients("triton", x, torch.tensor(1.0), torch.tensor(1.0), None)[0]
    assert spikes.tolist() == [[1.0, 0.0, -1.0, 0.0]]


def test_kernels_compile_for_gpus_without_one(compiled):
    constants = {
        "THRESHOLD_STRIDE": 1, "DECAY_STRIDE": 0, "HAS_V0": True, "MEAN": False, "TERNARY": True, "SOFT": True,
        "ROWS": 4, "COLUMNS": 256,
    }  # fmt: skip
    backward = {"HAS_SPIKES": True, "HAS_LAST": True, "ATTACHED": True, "PARAMETERS": True, "SHAPE": 0, "STEPS": 4}
    ones = {"N": 1, "C": 1, "T": 1, "segments": 1, "ROWS": 1, "STEPS": 1}
    kernels = [
        ("_forward_kernel", constants),
        ("_forward_kernel", constants | {"MEAN": True}),
        ("_backward_kernel", constants | backward),
        # The JIT passes an argument that is 1 as a constant: N is 1 whenever threshold and decay are for all channels.
        ("_forward_kernel", constants | ones),
        ("_backward_kernel", constants | backward | ones),
    ]
    types = dict.fromkeys(("x", "spikes", "grad_spikes", "grad_x"), "*bf16") | {"width": "fp32"}
    types |= dict.fromkeys(("N", "C", "T", "segments"), "i32")
    lines = compiled("asnn_goose.kernels.lif.triton", kernels, types, enable_fp_fusion=False)
    # A fused multiply-add would round beta v + x once instead of twice.
    assert lines == [f"{name} {capability} False" for name, _ in kernels for capability in (80, 90)]

"""Gradients of lif and lif_rate against autograd through the surrogates' antiderivatives, in float64."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.lif import lif, lif_rate

KINDS, RESETS = ("ternary", "binary"), ("soft", "hard")
SURROGATES = ("atan", "triangle", "sigmoid", "superspike", "rectangle")
BACKENDS = ("reference", "numba")
DYNAMICS = list(itertools.product(KINDS, RESETS))

# G with G' = g, up to a constant.
PRIMITIVE = {
    "atan": lambda u, w: torch.atan(math.pi * u / w) / math.pi,
    "triangle": lambda u, w: (u / w).clamp(-1, 1) * (1 - (u / w).clamp(-1, 1).abs() / 2),
    "sigmoid": lambda u, w: torch.sigmoid(u / w),
    "superspike": lambda u, w: u / (w + u.abs()),
    "rectangle": lambda u, w: (u / w).clamp(-0.5, 0.5),
}


def smooth_spikes(currents, theta, beta, v, kind, reset, detach_reset, surrogate, width):
    """(spikes, membrane), where autograd takes the spike's derivative from G: |s| = [hard] + (G - G.detach())."""
    spikes = []
    for x in currents:
        v = beta * v + x
        size = v.abs() if kind == "ternary" else v
        smooth = PRIMITIVE[surrogate](size - theta, width)
        size_s = (size >= theta).to(v.dtype) + smooth - smooth.detach()
        s = torch.sign(v) * size_s if kind == "ternary" else size_s
        if reset == "soft":
            v = v - (s * theta).detach() if detach_reset else v - s * theta
        else:
            v = v * (1 - (size_s.detach() if detach_reset else size_s))
        spikes.append(s)
    return torch.stack(spikes), v


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Values of float32 in float64, so that both precisions start from the same numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def shares(*shape: int) -> Tensor:
    """Decays in (0, 1), the same in both precisions."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)).double()


def gradients(call, *values: Tensor) -> list[Tensor | None]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    call(*leaves).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_rate_has_the_gradient_of_the_surrogate(surrogate: str, kind: str, reset: str, detach_reset: bool):
    # More channels than one of numba's blocks of 1024 holds.
    width, C = 0.7, 1100
    grad = numbers(3, C, seed=9)
    options: dict[str, Any] = {"kind": kind, "reset": reset, "detach_reset": detach_reset, "surrogate": surrogate}
    values = numbers(3, C), 0.5 + numbers(C, seed=1).abs(), shares(C), numbers(3, C, seed=2) / 4

    def oracle(x, theta, beta, v0):
        return (smooth_spikes(x.expand(4, -1, -1), theta, beta, v0, width=width, **options)[0].mean(0) * grad).sum()

    def ours(x, theta, beta, v0, backend):
        rate = lif_rate(x, 4, threshold=theta, decay=beta, v0=v0, width=width, backend=backend, **options)
        return (rate * grad.to(rate.dtype)).sum()

    expected = gradients(oracle, *values)
    reference = gradients(partial(ours, backend="reference"), *values)
    native = gradients(partial(ours, backend="numba"), *(value.float() for value in values))
    for wanted, plain, fast in zip(expected, reference, native, strict=True):
        assert wanted is not None and plain is not None and fast is not None
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(plain, wanted, rtol=1e-11, atol=1e-12)
        # A membrane is rounded to 2e-7 and the slope of g, 9 at this width, carries that into the gradient. No membrane
        # here lies so near a threshold or a kink that it flips.
        assert (fast - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
def test_spikes_and_membrane_of_lif_carry_gradient(kind: str, reset: str, detach_reset: bool):
    options: dict[str, Any] = {"kind": kind, "reset": reset, "detach_reset": detach_reset, "surrogate": "atan"}
    values = numbers(5, 2, 6), 0.5 + numbers(6, seed=1).abs(), shares(6), numbers(2, 6, seed=2)
    grad_s, grad_v = numbers(5, 2, 6, seed=3), numbers(2, 6, seed=4)

    def weighted(result):
        spikes, v = result
        return (spikes * grad_s.to(v.dtype)).sum() + (v * grad_v.to(v.dtype)).sum()

    def ours(x, theta, beta, v0, backend):
        return weighted(lif(x, threshold=theta, decay=beta, v0=v0, backend=backend, **options))

    expected = gradients(lambda *leaves: weighted(smooth_spikes(*leaves, width=1.0, **options)), *values)
    found = gradients(partial(ours, backend="reference"), *values)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    native = gradients(partial(ours, backend="numba"), *(value.float() for value in values))
    for fast, wanted in zip(native, expected, strict=True):
        assert fast is not None and wanted is not None
        assert (fast - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@pytest.mark.parametrize("result", [0, 1])
def test_spikes_or_membrane_alone_carry_gradient_in_numba(result: int):
    values = numbers(5, 2, 6), 0.5 + numbers(6, seed=1).abs(), shares(6), numbers(2, 6, seed=2)

    def one(x, theta, beta, v0, backend):
        return lif(x, threshold=theta, decay=beta, v0=v0, backend=backend)[result].square().sum()

    wanted = gradients(partial(one, backend="reference"), *values)
    found = gradients(partial(one, backend="numba"), *(value.float() for value in values))
    for fast, plain in zip(found, wanted, strict=True):
        assert fast is not None
        # None: autograd found no way from a membrane that was reset softly, with the reset detached, to the threshold.
        plain = torch.zeros_like(fast) if plain is None else plain
        assert (fast - plain).abs().max() <= 5e-6 * plain.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_threshold_and_decay_for_all_receive_the_sum_over_channels(backend: str):
    x = numbers(5, 7).float()

    def grads(*shape: int) -> list[Tensor | None]:
        values = torch.full(shape, 0.8), torch.full(shape, 0.6)
        return gradients(
            lambda theta, beta: lif_rate(x, 3, threshold=theta, decay=beta, backend=backend).sum(), *values
        )

    for scalar, single, channels in zip(grads(), grads(1), grads(7), strict=True):
        assert scalar is not None and single is not None and channels is not None
        torch.testing.assert_close(scalar, channels.sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(single, scalar[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_threshold_of_a_silent_channel(backend: str):
    """ds/dtheta = -sign(v) g: 0 at v = 0 for ternary, and -g(-theta) for binary."""
    slopes = {}
    for kind in KINDS:
        (grad,) = gradients(
            lambda theta, kind=kind: lif_rate(
                torch.zeros(5), 4, threshold=theta, decay=1.0, kind=kind, backend=backend
            ).sum(),
            torch.tensor(1.0),
        )
        slopes[kind] = None if grad is None else grad.item()
    assert slopes == pytest.approx({"ternary": 0.0, "binary": -5 / (1 + math.pi**2)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_membranes_of_ten_thousand_give_no_nan(surrogate: str, kind: str, reset: str, backend: str):
    values = torch.tensor([1e4, -1e4, 0.0, 1.0, -1.0]), torch.tensor(1.0), torch.tensor(0.9)
    grads = gradients(
        lambda x, theta, beta: lif_rate(
            x, 4, threshold=theta, decay=beta, kind=kind, reset=reset, detach_reset=False, surrogate=surrogate,
            backend=backend,
        ).sum(),
        *values,
    )  # fmt: skip
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_expanded_gradient(backend: str):
    packed = numbers(6, 4, 5).float()
    strided = packed.permute(2, 0, 1)[::2, :, ::3]
    theta = torch.tensor(0.5)

    def call(x, theta):
        # The gradient of a sum is one number, expanded to the output's shape.
        return lif_rate(x, 4, threshold=theta, decay=0.9, backend=backend).sum()

    through_view = gradients(lambda x, theta: call(x.permute(2, 0, 1)[::2, :, ::3], theta), packed, theta)
    direct = gradients(call, strided.contiguous(), theta)
    assert through_view[0] is not None
    assert torch.equal(through_view[0].permute(2, 0, 1)[::2, :, ::3], direct[0])  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(through_view[1], direct[1])


def test_threads_only_reorder_the_sum_over_rows():
    values = numbers(301, 40).float(), torch.full((40,), 0.7), torch.full((40,), 0.8)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(
                gradients(
                    lambda x, theta, beta: lif_rate(x, 4, threshold=theta, decay=beta, backend="numba").square().sum(),
                    *values,
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_input_gets_its_float32_gradient_rounded(dtype: torch.dtype, backend: str):
    x = numbers(4, 8).to(dtype)
    (narrow,) = gradients(lambda x: lif_rate(x, 4, threshold=0.5, decay=0.9, backend=backend).sum(), x)
    (wide,) = gradients(lambda x: lif_rate(x, 4, threshold=0.5, decay=0.9, backend=backend).sum(), x.float())
    assert narrow is not None and wide is not None
    assert torch.equal(narrow, wide.to(dtype))


class Stop(torch.autograd.Function):
    """The identity, through which no gradient comes, and not one of 0 either."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_nothing_arrives_at_has_a_gradient_of_0(backend: str):
    x = torch.linspace(0.1, 2.0, 4096)

    def stopped(x):
        rate = Stop.apply(lif_rate(x, 4, threshold=1.0, decay=0.5, backend=backend))
        assert isinstance(rate, Tensor)
        return rate.sum()

    (grad,) = gradients(stopped, x)
    assert grad is None or not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_be_changed_in_place(backend: str):
    """What is overwritten no longer depends on the current."""
    x = torch.full((2, 3), 0.75, requires_grad=True)
    spikes, v = lif(x, threshold=1.0, decay=0.5, backend=backend)
    rate = lif_rate(x, 2, threshold=1.0, decay=0.5, backend=backend)
    for result in (spikes, v, rate):
        result[0] = 0.0
        result.mul_(3.0)
        assert not result[0].any()
    (grad,) = torch.autograd.grad(v.sum(), x, retain_graph=True)
    # v = 0.5 x_0 + x_1, and the detached soft reset subtracts a constant.
    assert grad.tolist() == [[0.0, 1.5, 1.5], [0.0, 3.0, 3.0]]
    (grad,) = torch.autograd.grad(rate.sum(), x)
    assert not grad[0].any() and grad[1].all()


def test_a_second_derivative_through_numba_is_refused_not_dropped():
    x = torch.full((3,), 0.6, requires_grad=True)
    rate = lif_rate(x, 2, threshold=1.0, decay=0.9)
    # The gradient of a plain sum depends on nothing, which PyTorch's own mark takes for a constant.
    for value in (rate.square().sum(), rate.sum()):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

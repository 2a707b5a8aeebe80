"""Every form of wkv7 in float32 and in its diagonal form, against the reference in float64.

Shapes: B batch, L tokens, H heads, D channels of a head (V of a value).
"""

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.wkv7 import wkv7
from tests.kernels.test_wkv7 import HEAD_SIZES, LENGTHS, inputs, relative_to_largest, results_and_gradients

FORMS = ("reference", "torch_chunk", "native")
GRADIENTS = ("y", "S", "r", "log_w", "k", "v", "a", "b", "state")


def diagonal(tensors: list[Tensor], backend: str) -> list[Tensor]:
    """y, state and gradients without a and b."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    r, log_w, k, v, _, _, state = leaves
    y, last = wkv7(r, log_w, k, v, None, None, state=state, backend=backend)
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=draw).to(x.dtype) for x in (y, last)]
    torch.autograd.backward([y, last], weights)
    return [y.detach(), last.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("D", [*HEAD_SIZES, 64])
@pytest.mark.parametrize("L", LENGTHS)
def test_native_equals_the_reference_with_all_gradients(L: int, D: int):
    tensors = inputs(2, L, 3, D, V=D if D != 16 else 24)
    wanted = results_and_gradients(tensors, backend="reference")
    found = results_and_gradients([x.float() for x in tensors], backend="native")
    for name, single, exact in zip(GRADIENTS, found, wanted, strict=True):
        assert single.dtype == torch.float32
        assert relative_to_largest(single, exact) <= 5e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("backend", FORMS[1:])
def test_a_thousand_tokens(backend: str):
    tensors = inputs(1, 1000, 2, 64)
    wanted = results_and_gradients(tensors, backend="reference")
    found = results_and_gradients([x.float() for x in tensors], backend=backend)
    for name, single, exact in zip(GRADIENTS, found, wanted, strict=True):
        assert relative_to_largest(single, exact) <= 5e-6, name


@pytest.mark.parametrize("backend", FORMS)
def test_bfloat16_input_costs_its_rounding(backend: str):
    """Root mean square over entries, relative to that of the float64 result of the unrounded input."""
    tensors = inputs(2, 100, 2, 64)
    wanted = results_and_gradients(tensors, backend="reference")
    found = results_and_gradients([x.bfloat16() for x in tensors], backend=backend)
    for name, narrow, exact in zip(GRADIENTS, found, wanted, strict=True):
        assert (narrow.double() - exact).norm() <= 8e-3 * exact.norm(), name


@pytest.mark.parametrize("L", [1, 31, 33, 100])
def test_the_diagonal_form_equals_a_correction_of_zero(L: int):
    tensors = inputs(2, L, 2, 8, 6)
    zero = [*tensors[:4], *(torch.zeros_like(x) for x in tensors[4:6]), tensors[6]]
    exact = results_and_gradients(zero, backend="reference")
    wanted = [x for name, x in zip(GRADIENTS, exact, strict=True) if name not in "ab"]
    for backend in ("reference", "torch_chunk"):
        for found, x in zip(diagonal(tensors, backend), wanted, strict=True):
            assert relative_to_largest(found, x) <= 1e-12
    for found, x in zip(diagonal([x.float() for x in tensors], "native"), wanted, strict=True):
        assert relative_to_largest(found, x) <= 5e-6


@pytest.mark.parametrize("log_w", [0.0, -0.6065, -5.0, -80.0, -1e4])
def test_native_takes_any_decay(log_w: float):
    tensors = inputs(1, 64, 2, 8, dtype=torch.float32)
    tensors[1] = torch.full_like(tensors[1], log_w)
    wanted = results_and_gradients([x.double() for x in tensors], backend="reference")
    for found, exact in zip(results_and_gradients(tensors, backend="native"), wanted, strict=True):
        assert (found - exact).abs().max() <= 5e-6 * exact.abs().max()


def test_native_continues_a_sequence_and_takes_strided_input():
    *six, state = inputs(2, 70, 3, 8, 4, dtype=torch.float32)
    y, last = wkv7(*six, state=state, backend="native")
    first, carried = wkv7(*(x[:, :41] for x in six), state=state, backend="native")
    second, end = wkv7(*(x[:, 41:] for x in six), state=carried, backend="native")
    # The same operations in the same order: nothing depends on where the sequence was cut.
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(end, last)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in six]
    again = wkv7(*strided, state=state.mT.contiguous().mT, backend="native")
    assert torch.equal(again[0], y) and torch.equal(again[1], last)


def test_native_writes_every_entry_of_its_results(monkeypatch: pytest.MonkeyPatch):
    """Fresh buffers poisoned with NaN leave no trace."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    for L in (1, 16, 17):
        tensors = inputs(1, L, 2, 8, 12, dtype=torch.float32)
        assert not any(x.isnan().any() for x in results_and_gradients(tensors, backend="native"))
        assert not any(x.isnan().any() for x in diagonal(tensors, "native"))


def test_native_does_not_depend_on_the_number_of_threads():
    tensors = inputs(2, 40, 3, 16, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results_and_gradients(tensors, backend="native")
        torch.set_num_threads(2)
        two = results_and_gradients(tensors, backend="native")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_backend_that_cannot_run_says_why():
    *six, state = inputs(1, 9, 1, 4)
    with pytest.raises(ValueError, match="wkv7 backend native takes bfloat16, float16, float32, not float64"):
        wkv7(*six, backend="native")
    with pytest.raises(ValueError, match="wkv7 backend fla runs on cuda, not on cpu"):
        wkv7(*six, backend="fla")
    with pytest.raises(ValueError, match="a and b are given together or not at all"):
        wkv7(six[0], six[1], six[2], six[3], six[4], None, state=state)

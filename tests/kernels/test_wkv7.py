"""wkv7 against a float64 loop in numpy, closed forms of special cases, gradcheck, and the forms against each other.

Shapes: B batch, L tokens, H heads, D channels of a head (V of a value).
"""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.kernels.backend import log_choice
from asnn_goose.kernels.wkv7 import LOG_W_MIN, wkv7, wkv7_step

LENGTHS, HEAD_SIZES = (1, 2, 31, 32, 33, 63, 250), (8, 16, 60)
BACKENDS = ("reference", "torch_chunk")
NAMES: tuple[str, ...] = ("r", "log_w", "k", "v", "a", "b", "state")


def loop(r, log_w, k, v, a, b, state) -> tuple[np.ndarray, np.ndarray]:
    """S <- S (diag(w) + a b^T) + v k^T, y = S r with D x D matrices, one batch, head and token at a time."""
    r, log_w, k, v, a, b, state = (x.detach().double().numpy() for x in (r, log_w, k, v, a, b, state))
    y, last = np.zeros(v.shape), np.zeros(state.shape)
    for i in range(r.shape[0]):
        for h in range(r.shape[2]):
            S = state[i, h]
            for t in range(r.shape[1]):
                S = S @ (np.diag(np.exp(log_w[i, t, h])) + np.outer(a[i, t, h], b[i, t, h]))
                S = S + np.outer(v[i, t, h], k[i, t, h])
                y[i, t, h] = S @ r[i, t, h]
            last[i, h] = S
    return y, last


def inputs(B: int, L: int, H: int, D: int, V: int | None = None, dtype=torch.float64):
    """r, log_w, k, v, a, b, state as RWKV-7 makes them: a = -kappa, b = kappa * rate, |kappa| = 1, bounded log_w."""
    draw = torch.Generator().manual_seed(1000 * L + D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    kappa = torch.nn.functional.normalize(normal(B, L, H, D), dim=-1)
    log_w = LOG_W_MIN * torch.sigmoid(3 * normal(B, L, H, D))
    rate = torch.sigmoid(normal(B, L, H, D))
    v, state = normal(B, L, H, V or D), normal(B, H, V or D, D)
    made = (normal(B, L, H, D), log_w, normal(B, L, H, D), v, -kappa, kappa * rate, state)
    # Rounded to float32 first, so that both precisions start from the same numbers.
    return [x.float().to(dtype) for x in made]


def run(tensors, **options: Any) -> tuple[Tensor, Tensor]:
    *six, state = tensors
    return wkv7(*six, state=state, **options)


def results_and_gradients(tensors, **options: Any) -> list[Tensor]:
    """y, state, and the gradients of a fixed weighted sum of both in all six inputs and the first state."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y, state = run(leaves, **options)
    draw = torch.Generator().manual_seed(7)
    total = sum((x * torch.randn(x.shape, generator=draw).to(x.dtype)).sum() for x in (y, state))
    assert isinstance(total, Tensor)
    total.backward()
    return [y.detach(), state.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative_to_largest(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(("L", "D", "V"), [(1, 8, 8), (7, 4, 6), (33, 16, 16)])
def test_reference_equals_the_loop(L: int, D: int, V: int):
    tensors = inputs(2, L, 3, D, V)
    for found, wanted in zip(run(tensors, backend="reference"), loop(*tensors), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("L", LENGTHS)
def test_chunks_equal_the_reference_with_all_gradients(L: int, D: int):
    tensors = inputs(1, L, 2, D)
    wanted = results_and_gradients(tensors, backend="reference")
    assert len(wanted) == 9
    found = results_and_gradients(tensors, backend="torch_chunk")
    narrow = results_and_gradients([x.float() for x in tensors], backend="torch_chunk")
    for name, exact, chunked, single in zip(("y", "S", *NAMES), wanted, found, narrow, strict=True):
        assert relative_to_largest(chunked, exact) <= 1e-13, name
        assert single.dtype == torch.float32
        assert relative_to_largest(single, exact) <= 5e-6, name


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 1000])
def test_chunk_size_does_not_matter(chunk_size: int):
    tensors = inputs(2, 37, 1, 8, 5)
    wanted = results_and_gradients(tensors, backend="reference")
    for found, exact in zip(results_and_gradients(tensors, chunk_size=chunk_size), wanted, strict=True):
        assert relative_to_largest(found, exact) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str):
    tensors = [x.requires_grad_() for x in inputs(1, 5, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda *t: run(t, backend=backend, chunk_size=2), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(cut=st.integers(1, 69), chunk_size=st.sampled_from([8, 32]))
def test_a_carried_state_continues_the_sequence(backend: str, cut: int, chunk_size: int):
    *six, state = inputs(2, 70, 1, 8, 4)
    options: dict[str, Any] = {"backend": backend, "chunk_size": chunk_size}
    y, last = wkv7(*six, state=state, **options)
    first, carried = wkv7(*(x[:, :cut] for x in six), state=state, **options)
    second, end = wkv7(*(x[:, cut:] for x in six), state=carried, **options)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_steps_are_the_reference():
    *six, state = inputs(2, 9, 3, 8, 5)
    y, last = wkv7(*six, state=state, backend="reference")
    for t in range(9):
        r, log_w, k, v, a, b = (x[:, t] for x in six)
        y_t, state = wkv7_step(r, log_w, k, v, a, b, state)
        assert torch.equal(y_t, y[:, t])
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_state_it_starts_from_zero(backend: str):
    *six, state = inputs(1, 20, 2, 8)
    zero = wkv7(*six, state=torch.zeros_like(state), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(wkv7(*six, backend=backend), zero, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_correction_it_is_decaying_linear_attention(backend: str):
    """y_t = sum_{i<=t} v_i (k_i exp(sum_{i<j<=t} log_w_j)) . r_t."""
    r, log_w, k, v, a, _, _ = inputs(1, 45, 1, 8)
    y, _ = wkv7(r, log_w, k, v, torch.zeros_like(a), torch.zeros_like(a), backend=backend)
    log_W = log_w[0, :, 0].cumsum(0)
    decay = torch.exp(log_W[:, None] - log_W[None]).nan_to_num(posinf=0.0)
    scores = torch.einsum("td,tid,id->ti", r[0, :, 0], decay, k[0, :, 0]).tril()
    torch.testing.assert_close(y[0, :, 0], scores @ v[0, :, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_correction_replaces_what_the_key_held(backend: str):
    """w = 1, a = -k, b = k, |k| = 1 (the delta rule): reading with a key gives the value that was written last."""
    _, log_w, _, v, a, _, state = inputs(1, 40, 1, 8)
    a = a / a.norm(dim=-1, keepdim=True)
    y, last = wkv7(-a, torch.zeros_like(log_w), -a, v, a, -a, state=state, backend=backend)
    torch.testing.assert_close(y, v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last[0, 0] @ -a[0, -1, 0], v[0, -1, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, backend: str):
    tensors = [x.to(dtype) for x in inputs(1, 40, 2, 8)]
    found = results_and_gradients(tensors, backend=backend)
    wanted = results_and_gradients([x.float() for x in tensors], backend=backend)
    assert found[0].dtype == found[1].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_narrow_the_state(backend: str):
    tensors = inputs(1, 40, 2, 8, dtype=torch.float32)
    wanted = run(tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(tensors, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_strided_input():
    packed = inputs(2, 40, 3, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed[:6]]
    strided.append(packed[6].mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in strided)
    for backend in BACKENDS:
        for found, wanted in zip(run(strided, backend=backend), run(packed, backend=backend), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("log_w", "tolerance"), [(LOG_W_MIN, 5e-6), (-2.4, 2e-5)])
def test_the_strongest_decay_everywhere(log_w: float, tolerance: float):
    """RWKV-7's, and the strongest that a chunk can hold, where a logarithm near 77 is rounded to 4e-6."""
    tensors = inputs(1, 64, 2, 8, dtype=torch.float32)
    tensors[1] = torch.full_like(tensors[1], log_w)
    wanted = results_and_gradients([x.double() for x in tensors], backend="reference")
    for found, exact in zip(results_and_gradients(tensors, backend="torch_chunk"), wanted, strict=True):
        assert relative_to_largest(found, exact) <= tolerance


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_strong_decay_leaves_room_for_large_values(diagonal: bool):
    """exp(2.45 * 32) times keys of 1000 is near the largest float32, and the gradient of a decay multiplies both."""
    tensors = inputs(1, 64, 2, 8)
    tensors[1], tensors[2] = torch.full_like(tensors[1], -2.45), tensors[2] * 1000.0
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "torch_chunk")):
        leaves = [x.to(dtype).requires_grad_() for x in (tensors[:4] if diagonal else tensors[:6])]
        correction = (None, None) if diagonal else leaves[4:]
        y, _ = wkv7(*leaves[:4], *correction, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.square().mean(), leaves)])
    for exact, found in zip(*results, strict=True):
        assert found.isfinite().all()
        assert relative_to_largest(found, exact) <= 2e-5


def test_what_a_token_gets_does_not_depend_on_the_decays_after_it():
    tensors = inputs(1, 32, 2, 8, dtype=torch.float32)
    y, _ = run(tensors, backend="torch_chunk")
    tensors[1] = torch.cat([tensors[1][:, :20], torch.full_like(tensors[1][:, 20:], -2.0)], 1)
    changed, _ = run(tensors, backend="torch_chunk")
    assert torch.equal(changed[:, :20], y[:, :20]) and not torch.equal(changed[:, 20:], y[:, 20:])


def test_a_decay_that_a_chunk_cannot_hold_is_refused():
    tensors = inputs(1, 40, 1, 8, dtype=torch.float32)
    tensors[1][0, 3, 0, 2] = -5.0
    message = (
        r"\|log_w\| reaches 5, which over chunk_size 32 may overflow torch.float32: use a chunk_size of at most 16 "
    )
    with pytest.raises(ValueError, match=message):
        run(tensors, backend="torch_chunk")
    wanted = run([x.double() for x in tensors], backend="reference")
    for options in ({"backend": "torch_chunk", "chunk_size": 16}, {"backend": "reference"}, {"backend": "native"}, {}):
        for found, exact in zip(run(tensors, **options), wanted, strict=True):
            assert relative_to_largest(found, exact) <= 5e-6
    tensors[1][0, 3, 0, 2] = -100.0
    with pytest.raises(ValueError, match=r"which over chunk_size 1 may overflow torch.float32: use another backend$"):
        run(tensors, backend="torch_chunk", chunk_size=1)
    # Growth overflows on the other side.
    tensors[1][0, 3, 0, 2] = 5.0
    with pytest.raises(ValueError, match=r"\|log_w\| reaches 5"):
        run(tensors, backend="torch_chunk")


@pytest.mark.parametrize("decay", [-50.0, -200.0, -math.inf])
def test_auto_takes_chunks_as_short_as_the_decay_asks_for(decay: float):
    """700 / 50 is 14 tokens; shorter than 8 it goes token by token."""
    tensors = inputs(1, 40, 1, 8)
    tensors[1][0, 3, 0, 2] = decay
    for found, wanted in zip(run(tensors), run(tensors, backend="reference"), strict=True):
        assert relative_to_largest(found, wanted) <= 1e-12


@pytest.mark.parametrize("backend", ["auto", "native", "torch_chunk", "reference"])
def test_no_window_is_no_output(backend: str):
    tensors = [x.requires_grad_() for x in inputs(0, 40, 3, 8, dtype=torch.float32)]
    y, state = wkv7(*tensors[:6], state=tensors[6], backend=backend)
    assert (y.shape, state.shape) == (tensors[3].shape, tensors[6].shape)
    (y.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in tensors)


def test_a_short_sequence_is_one_short_chunk():
    """Eight tokens of log_w = -5 need exp(40), not the exp(160) of a whole chunk."""
    tensors = inputs(1, 8, 1, 8, dtype=torch.float32)
    tensors[1] = torch.full_like(tensors[1], -5.0)
    wanted = run([x.double() for x in tensors], backend="reference")
    for found, exact in zip(run(tensors, backend="torch_chunk"), wanted, strict=True):
        assert relative_to_largest(found, exact) <= 1e-5


@pytest.mark.parametrize(("L", "expected"), [(7, "reference"), (8, "torch_chunk")])
def test_choice_of_backend_is_logged_once(L: int, expected: str, caplog: pytest.LogCaptureFixture):
    log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "asnn_goose.kernels.backend"):
        for _ in range(3):
            run(inputs(1, L, 1, 4))
    assert caplog.messages == [f"wkv7: backend {expected}"]


def with_one(name: str, change) -> dict[str, Any]:
    tensors = dict(zip(NAMES, inputs(2, 9, 3, 8, 4), strict=True))
    tensors[name] = change(tensors[name])
    return tensors


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (with_one("k", lambda x: x[:, :-1]), {}, "of equal shape"),
        (with_one("a", lambda x: x[..., :1]), {}, "of equal shape"),
        (with_one("v", lambda x: x[:, :, :1]), {}, "of equal shape"),
        (with_one("r", lambda x: x[0]), {}, r"must be \[B, L, H, D\]"),
        (dict(zip(NAMES, inputs(2, 0, 3, 8), strict=True)), {}, "at least one token"),
        (with_one("r", Tensor.long), {}, "floating-point tensors, not torch.int64"),
        (with_one("b", Tensor.long), {}, "floating-point tensors, not torch.int64"),
        (with_one("state", lambda x: x.mT), {}, r"D_v, D_k\] = \(2, 3, 4, 8\), not \(2, 3, 8, 4\)"),
        (with_one("state", lambda x: x[0]), {}, r"D_v, D_k\] = \(2, 3, 4, 8\), not \(3, 4, 8\)"),
        (with_one("state", lambda x: x), {"chunk_size": 0}, "chunk_size must be a whole number of at least 1, not 0"),
        (
            with_one("state", lambda x: x),
            {"chunk_size": 4.0},
            "chunk_size must be a whole number of at least 1, not 4.0",
        ),
        (
            with_one("state", lambda x: x),
            {"backend": "triton"},
            "must be auto, native, fla, torch_chunk, reference, not 'triton'",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(tensors: dict[str, Tensor], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as told:
        wkv7(**tensors, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(told.value)

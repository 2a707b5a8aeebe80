"""lif and lif_rate, forward, against scalar float64 loops, closed forms, SpikingJelly and snnTorch."""

import itertools
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron as spikingjelly
from spikingjelly.activation_based import surrogate as spikingjelly_surrogate
from torch import Tensor

from asnn_goose.kernels.backend import log_choice
from asnn_goose.kernels.lif import lif, lif_backend, lif_rate

KINDS, RESETS = ("ternary", "binary"), ("soft", "hard")
BACKENDS = ("reference", "numba")
DYNAMICS = list(itertools.product(KINDS, RESETS))


def scalar_loop(current, theta, beta, kind, reset, v=0.0):
    """One channel in Python floats, by the formula: spikes, and the membrane after the last reset."""
    spikes = []
    for x in current:
        v = beta * v + x
        s = float(v >= theta) - float(kind == "ternary" and v <= -theta)
        v = v - theta * s if reset == "soft" else (0.0 if s else v)
        spikes.append(s)
    return spikes, v


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    """theta 1, beta 1/2, current 0.75: charged 0.75, 1.125, 0.8125, 1.15625."""
    spikes, v = lif(torch.full((4, 1), 0.75), threshold=1.0, decay=0.5)
    assert spikes.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    assert v.item() == 0.15625
    spikes, v = lif(torch.full((4, 1), -0.75), threshold=1.0, decay=0.5, reset="hard")
    assert spikes.flatten().tolist() == [0.0, -1.0, 0.0, -1.0]
    assert v.item() == 0.0


@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
def test_float64_equals_a_scalar_loop(kind: str, reset: str):
    current, v0 = numbers(6, 3, 5), numbers(3, 5, seed=1)
    theta, beta = numbers(5, seed=2).abs() + 0.1, numbers(5, seed=3).sigmoid()
    spikes, v = lif(current, threshold=theta, decay=beta, kind=kind, reset=reset, v0=v0)
    assert spikes.dtype == v.dtype == torch.float64
    for n, c in itertools.product(range(3), range(5)):
        expected = scalar_loop(current[:, n, c].tolist(), theta[c].item(), beta[c].item(), kind, reset, v0[n, c].item())
        assert (spikes[:, n, c].tolist(), v[n, c].item()) == expected


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("reset", RESETS)
def test_binary_equals_spikingjelly_with_its_gradient(reset: str, detach_reset: bool):
    x = numbers(8, 5, 16).float()
    # tau 2 halves the membrane, which is exact: both sides hold the same float32 state.
    peer = spikingjelly.LIFNode(
        tau=2.0,
        decay_input=False,
        v_threshold=0.75,
        v_reset=None if reset == "soft" else 0.0,
        surrogate_function=spikingjelly_surrogate.ATan(),
        detach_reset=detach_reset,
        step_mode="m",
    )
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = peer(theirs)
    spikes, v = lif(ours, threshold=0.75, decay=0.5, kind="binary", reset=reset, detach_reset=detach_reset)
    assert torch.equal(spikes, expected)
    assert isinstance(peer.v, Tensor)
    assert torch.equal(v, peer.v)
    grad = numbers(8, 5, 16, seed=1).float()
    expected.backward(grad)
    spikes.backward(grad)
    # The order of a handful of float32 products differs.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reset", RESETS)
def test_ternary_fires_as_spikingjellys(reset: str):
    x = torch.randint(-16, 17, (8, 4, 32), generator=torch.Generator().manual_seed(0)) / 16.0
    v_reset = None if reset == "soft" else 0.0
    peer = spikingjelly.TernaryLIFNode(tau=2.0, decay_input=False, v_threshold=0.75, v_reset=v_reset, step_mode="m")
    expected = peer(x)
    spikes, v = lif(x, threshold=0.75, decay=0.5, reset=reset)
    assert torch.equal(spikes, expected)
    assert isinstance(peer.v, Tensor)
    assert torch.equal(v, peer.v)
    assert set(spikes.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_binary_equals_snntorch_where_no_membrane_is_at_the_threshold():
    """snnTorch fires strictly above the threshold, and twice in a row if a membrane is beyond 2 theta."""
    x = numbers(12, 64).float().clamp(-0.9, 0.9)
    peer = snntorch.Leaky(beta=0.5, threshold=1.0, reset_mechanism="subtract", reset_delay=False)
    membrane, expected = peer.init_leaky(), []
    for current in x:
        spike, membrane = peer(current, membrane)
        expected.append(spike)
    spikes, v = lif(x, threshold=1.0, decay=0.5, kind="binary")
    assert torch.equal(spikes, torch.stack(expected))
    torch.testing.assert_close(v, membrane, rtol=0, atol=1e-6)
    assert spikes.mean() > 0.05


def near_ties(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(current, membrane, decay) in float32 whose first charged voltage is theta = 1 or a neighbour of it."""
    draw = torch.Generator().manual_seed(0)
    v0, decay = torch.rand(count, generator=draw) + 0.1, torch.rand(count, generator=draw)
    return 1.0 - decay * v0, v0, decay


@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
def test_numba_spikes_bit_for_bit_as_the_reference(kind: str, reset: str):
    """10^6 elements: dyadic ones that meet the threshold exactly, ordinary ones, ones that a fused product flips."""
    count = 1_000_000 // 3
    dyadic = torch.randint(-64, 65, (count,), generator=torch.Generator().manual_seed(1)) / 32.0
    near, near_v0, near_decay = near_ties(count)
    x = torch.cat([dyadic, numbers(count, seed=2).float(), near])
    v0 = torch.cat([torch.zeros(2 * count), near_v0])
    decay = torch.cat([torch.ones(count), torch.rand(count, generator=torch.Generator().manual_seed(3)), near_decay])
    options: dict[str, Any] = {"threshold": 1.0, "decay": decay, "kind": kind, "reset": reset, "v0": v0}
    rates = [lif_rate(x, 4, backend=backend, **options) for backend in BACKENDS]
    assert torch.equal(*rates)
    (spikes, v), (native_spikes, native_v) = (lif(x.expand(3, -1), backend=backend, **options) for backend in BACKENDS)
    assert torch.equal(spikes, native_spikes)
    assert torch.equal(v, native_v)

    charged = near_decay * near_v0 + near
    fused = (near_decay.double() * near_v0.double() + near.double()).float()
    assert ((charged >= 1.0) != (fused >= 1.0)).sum() > 1000
    assert (dyadic.abs() == 1.0).sum() > 1000


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
def test_a_hundred_million_spikes_bit_for_bit(kind: str, reset: str):
    """Currents, thresholds, decays and membranes of every size, 10^6 at a time, over four micro-steps."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(25):
        current, v0 = (torch.randn(4, 1_000_000, generator=draw) * 2 for _ in range(2))
        theta, decay = torch.rand(1_000_000, generator=draw) + 0.01, torch.rand(1_000_000, generator=draw)
        options: dict[str, Any] = {"threshold": theta, "decay": decay, "kind": kind, "reset": reset, "v0": v0[0]}
        ours, plain = (lif(current, backend=backend, **options) for backend in ("numba", "reference"))
        assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_numba_writes_every_entry_of_its_results(monkeypatch: pytest.MonkeyPatch):
    """Fresh buffers poisoned with NaN leave no trace."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    x, v0 = numbers(3, 2, 1500).float().requires_grad_(), numbers(2, 1500, seed=1).float().requires_grad_()
    for learned in (False, True):
        theta = torch.full((1500,), 0.8, requires_grad=learned)
        spikes, v = lif(x, threshold=theta, decay=0.9, v0=v0, backend="numba")
        rate = lif_rate(x[0], 4, threshold=theta, decay=0.9, v0=v0, backend="numba")
        leaves = [x, v0, theta] if learned else [x, v0]
        grads = torch.autograd.grad(spikes.sum() + v.sum() + rate.sum(), leaves)
        assert not any(value.isnan().any() for value in (spikes, v, rate, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "reset"), DYNAMICS)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_rate_is_the_mean_of_lif_under_a_constant_current(steps: int, kind: str, reset: str, backend: str):
    x, v0 = numbers(7, 33).float(), numbers(7, 33, seed=1).float()
    theta, beta = numbers(33, seed=2).float().abs() + 0.1, numbers(33, seed=3).float().sigmoid()
    options: dict[str, Any] = {"threshold": theta, "decay": beta, "kind": kind, "reset": reset, "v0": v0}
    mean = lif(x.expand(steps, -1, -1), **options)[0].mean(0)
    assert torch.equal(lif_rate(x, steps, backend=backend, **options), mean)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(
    numerator=st.lists(st.integers(-160, 160), min_size=1, max_size=8),
    steps=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    reset=st.sampled_from(RESETS),
)
def test_without_decay_the_count_is_an_integer_division(numerator, steps: int, kind: str, reset: str, backend: str):
    """Soft: T x rounded towards 0; hard: a spike every ceil(1 / |x|) steps. At most T; 2 T + 1 levels, T + 1 binary."""
    expected = []
    for n in numerator:
        size = abs(n)
        count = 0 if n == 0 or (kind == "binary" and n < 0) else steps * size // 64 if reset == "soft" else (
            steps // -(-64 // size)
        )  # fmt: skip
        expected.append(math.copysign(min(count, steps), n))
    x = torch.tensor(numerator, dtype=torch.float32) / 64
    rate = lif_rate(x, steps, threshold=1.0, decay=1.0, kind=kind, reset=reset, backend=backend)
    assert torch.equal(rate, torch.tensor(expected) / steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_dead_zone_and_oddness(backend: str):
    x = torch.linspace(-1.5, 1.5, 3001)
    rate = lif_rate(x, 4, threshold=1.0, decay=1.0, backend=backend)
    assert rate.unique().tolist() == [k / 4 for k in range(-4, 5)]
    assert torch.equal(lif_rate(-x, 4, threshold=1.0, decay=1.0, backend=backend), -rate)
    binary = lif_rate(x, 4, threshold=1.0, decay=1.0, kind="binary", backend=backend)
    assert binary.unique().tolist() == [k / 4 for k in range(5)]
    # A leaking membrane never passes x (1 - beta^T) / (1 - beta).
    leaking = lif_rate(x, 4, threshold=1.0, decay=0.5, backend=backend)
    assert torch.equal(leaking != 0, x.abs() >= 0.5 / (1 - 0.5**4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_tensors(backend: str):
    strided = numbers(6, 4, 5).float().permute(2, 0, 1)[::2, :, ::3]
    assert not strided.is_contiguous()
    rate = lif_rate(strided, 4, threshold=0.5, decay=0.9, backend=backend)
    assert torch.equal(rate, lif_rate(strided.contiguous(), 4, threshold=0.5, decay=0.9, backend=backend))
    row = strided[0, 0]
    rate = lif_rate(row.expand(5, -1), 4, threshold=0.5, decay=0.9, v0=row.expand(5, -1), backend=backend)
    assert torch.equal(rate, lif_rate(row, 4, threshold=0.5, decay=0.9, v0=row, backend=backend).expand(5, -1))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 9), (torch.float16, 12)])
def test_state_is_float32_for_half_precision_input(dtype: torch.dtype, bits: int):
    """A membrane of the input's dtype would stay at 31/32: the current is half its last digit, and rounds to even."""
    steps = 2 ** (bits - 5)
    current, v0 = torch.full((2, 3), 2.0**-bits, dtype=dtype), torch.full((2, 3), 31 / 32, dtype=dtype)
    for backend in BACKENDS:
        spikes, v = lif(current.expand(steps, -1, -1), threshold=1.0, decay=1.0, v0=v0, backend=backend)
        assert (spikes.dtype, v.dtype) == (dtype, torch.float32)
        assert spikes[:-1].eq(0).all() and spikes[-1].eq(1).all() and v.eq(0).all()
        rate = lif_rate(current, steps, threshold=1.0, decay=1.0, v0=v0, backend=backend)
        assert torch.equal(rate, torch.full((2, 3), 1 / steps))


@pytest.mark.parametrize("backend", BACKENDS)
def test_membrane_carries_over(backend: str):
    x = numbers(9, 4).float()
    options: dict[str, Any] = {"threshold": 0.7, "decay": 0.8, "backend": backend}
    whole, v_whole = lif(x, **options)
    first, v = lif(x[:4], **options)
    second, v = lif(x[4:], v0=v, **options)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v, v_whole)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "numba"),
        ("cpu", torch.bfloat16, "numba"),
        ("cpu", torch.float64, "reference"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.float64, "reference"),
        ("meta", torch.float32, "reference"),
    ],
)
def test_auto_takes_the_compiled_form_where_it_runs(device: str, dtype: torch.dtype, expected: str):
    assert lif_backend("auto", torch.device(device), dtype) == expected


def test_choice_of_backend_is_logged_once(caplog: pytest.LogCaptureFixture):
    log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "asnn_goose.kernels.backend"):
        for _ in range(3):
            lif_rate(torch.zeros(2), 1, threshold=1.0, decay=1.0)
    assert caplog.messages == ["lif_rate: backend numba"]


def test_numba_comes_late_and_leaves_torchs_thread_count_alone():
    """In a process of its own: numba's first launch would set OpenMP's count to NUMBA_NUM_THREADS."""
    code = """
import sys, torch
from asnn_goose.kernels import lif_rate
torch.set_num_threads(1)
before = 'numba' in sys.modules
lif_rate(torch.zeros(2, 3), 2, threshold=1.0, decay=1.0, backend='numba')
print(before, torch.get_num_threads())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "False 1\n", run.stderr

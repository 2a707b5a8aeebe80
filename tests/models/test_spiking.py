"""The neuron against a scalar loop in numpy float64, its gradient against closed forms, its counts against brute force.

Shapes: N tokens, C channels, O outputs, T micro-steps.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from asnn_goose.config.schema import NeuronConfig
from asnn_goose.models.spiking import Neuron, SpikingLinear

N, C, O = 7, 6, 5  # noqa: E741


def _settings(**keys) -> dict:
    return NeuronConfig(**{"threshold": 1.3, **keys}).model_dump()


def _neuron(channels: int = C, **keys) -> Neuron:
    """In float64, with thresholds (and decays) that differ between channels where each has its own."""
    neuron = Neuron(channels, _settings(**keys)).double()
    with torch.no_grad():
        for number, parameter in enumerate(neuron.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return neuron


def _linear(**keys) -> SpikingLinear:
    linear = SpikingLinear(C, O, _settings(**keys)).double()
    linear.neuron = _neuron(**keys)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(9))
    return linear


def _currents(*shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _counts(x_NC: Tensor, neuron: Neuron) -> tuple[np.ndarray, np.ndarray]:
    """(spikes per token and channel, gain), one membrane at a time."""
    s, x = neuron.settings, x_NC.numpy()
    decay = torch.as_tensor(neuron.decay).detach().double().expand(C).numpy()
    theta = neuron.log_threshold.detach().exp().expand(C).numpy()
    counts, gains = np.zeros(x.shape), np.zeros(x.shape)
    for n, c in np.ndindex(x.shape):
        scale = np.abs(x[n]).mean() if s["scale"] == "token" else 1.0
        gains[n, c] = theta[c] * scale
        v = 0.0
        for _ in range(s["steps"]):
            v = decay[c] * v + x[n, c] / gains[n, c]
            spike = int(v >= 1.0) - int(v <= -1.0 and s["kind"] == "ternary")
            counts[n, c] += spike
            v = v - spike if s["reset"] == "soft" else v * (spike == 0)
    return counts, gains


KINDS = [
    {"kind": "ternary"},
    {"kind": "ternary", "scale": "none"},
    {"kind": "ternary", "learn_threshold": "channel", "reset": "hard"},
    {"kind": "ternary", "learn_threshold": "channel", "scale": "none", "steps": 3},
    {"kind": "ternary", "learn_threshold": "fixed", "decay": 0.7, "steps": 5},
    {"kind": "ternary", "learn_decay": "channel", "decay": 0.8, "learn_threshold": "channel", "reset": "hard"},
    {"kind": "binary", "learn_decay": "layer", "decay": 0.9},
    {"kind": "binary", "learn_threshold": "channel", "steps": 1},
]
each_kind = pytest.mark.parametrize("keys", KINDS, ids=lambda keys: "-".join(map(str, keys.values())))


# What it emits


@each_kind
def test_spikes_are_those_of_one_membrane_per_channel(keys):
    neuron, x_NC = _neuron(**keys), _currents(N, C)
    counts, gains = _counts(x_NC, neuron)
    assert 0.0 < (counts != 0).mean() < 1.0
    s_NC, gain = neuron(x_NC)
    np.testing.assert_array_equal((s_NC * neuron.steps).round().detach().numpy(), counts)
    np.testing.assert_array_equal(s_NC.detach().numpy(), counts / neuron.steps)
    np.testing.assert_allclose(gain.expand(N, C).detach().numpy(), gains, rtol=1e-14)
    spikes_TNC, gain = neuron.spikes(x_NC)
    assert set(spikes_TNC.unique().tolist()) <= {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal(spikes_TNC.sum(0).detach().numpy(), counts)
    np.testing.assert_allclose(gain.expand(N, C).detach().numpy(), gains, rtol=1e-14)


@settings(max_examples=60)
@given(current=st.floats(-3.0, 3.0), steps=st.integers(1, 9), binary=st.booleans())
def test_without_decay_it_rounds_towards_zero_to_the_nearest_of_its_levels(current, steps, binary):
    # At a tie the running sum of T currents and one product with T may round to different sides.
    assume(abs(steps * current - round(steps * current)) > 1e-9)
    kind = "binary" if binary else "ternary"
    neuron = Neuron(1, _settings(kind=kind, steps=steps, threshold=1.0, scale="none", learn_threshold="fixed"))
    s, _ = neuron.double()(torch.tensor([[current]], dtype=torch.float64))
    expected = np.copysign(min(steps, np.floor(steps * abs(current))), current)
    assert s.item() == (max(0.0, expected) if binary else expected) / steps


def test_a_decay_widens_the_dead_zone():
    T, decay = 4, 0.5
    neuron = Neuron(2, _settings(decay=decay, threshold=1.0, scale="none", learn_threshold="fixed")).double()
    # The membrane reaches x (1 - beta^T) / (1 - beta) at most before its first spike.
    first = (1.0 - decay) / (1.0 - decay**T)
    s, _ = neuron(torch.tensor([[first - 1e-9, first + 1e-9]], dtype=torch.float64))
    assert s.tolist() == [[0.0, 1.0 / T]]


@pytest.mark.parametrize("learn_threshold", ["layer", "channel"])
def test_the_quantised_twin_rounds_to_the_nearest_of_the_same_levels(learn_threshold):
    neuron, x_NC = _neuron(kind="quantised", steps=4, learn_threshold=learn_threshold), _currents(N, C)
    s_NC, gain = neuron(x_NC)
    levels = np.linspace(-1.0, 1.0, 9)
    wanted = x_NC.numpy() / gain.detach().expand(N, C).numpy()
    nearest = levels[np.abs(wanted[..., None] - levels).argmin(-1)]
    np.testing.assert_array_equal(s_NC.detach().numpy(), nearest)


def test_the_dense_twin_passes_the_current_on():
    neuron, x_NC = _neuron(kind="dense"), _currents(N, C)
    s_NC, gain = neuron(x_NC)
    assert torch.equal(s_NC, x_NC) and gain is None
    assert list(neuron.parameters()) == []


def test_a_token_scale_makes_spikes_blind_to_the_size_of_the_current():
    neuron, x_NC = _neuron(), _currents(N, C)
    s_NC, gain = neuron(x_NC)
    # A power of two, so that nothing rounds.
    larger_NC, larger_gain = neuron(64.0 * x_NC)
    assert torch.equal(larger_NC, s_NC) and torch.equal(larger_gain, 64.0 * gain)
    plain = _neuron(scale="none")
    assert not torch.equal(plain(64.0 * x_NC)[0], plain(x_NC)[0])


def test_a_token_of_zeros_stays_zero_with_a_finite_gradient():
    linear = _linear()
    x_NC = torch.zeros(2, C, dtype=torch.float64, requires_grad=True)
    y_NO = linear(x_NC)
    assert torch.equal(y_NO, torch.zeros_like(y_NO))
    y_NO.sum().backward()
    assert x_NC.grad is not None and x_NC.grad.isfinite().all()


def test_half_precision_input_meets_a_float32_state():
    neuron, x_NC = _neuron().float(), _currents(N, C).half()
    s_NC, gain = neuron(x_NC)
    assert s_NC.dtype == gain.dtype == torch.float32
    assert torch.equal(s_NC, neuron(x_NC.float())[0])


# Its product


@each_kind
@pytest.mark.parametrize("form", ["rate", "steps"])
def test_the_product_is_that_of_spikes_times_their_gains(keys, form):
    linear, x_NC = _linear(**keys), _currents(N, C, seed=1)
    linear.form = form
    counts, gains = _counts(x_NC, linear.neuron)
    expected = (counts / linear.neuron.steps * gains) @ linear.weight.detach().numpy().T
    np.testing.assert_allclose(linear(x_NC).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["quantised", "dense"])
def test_controls_have_one_form(kind):
    linear, x_NC = _linear(kind=kind, learn_threshold="channel"), _currents(N, C)
    y_NO = linear(x_NC)
    s_NC, gain = linear.neuron(x_NC)
    operand_NC = s_NC if gain is None else s_NC * gain
    torch.testing.assert_close(y_NO, operand_NC @ linear.weight.T, rtol=1e-12, atol=1e-12)
    linear.form = "steps"
    assert torch.equal(linear(x_NC), y_NO)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("form", ["rate", "steps"])
def test_bfloat16_products_see_exact_counts(steps, form):
    linear = SpikingLinear(C, C, _settings(steps=steps, threshold=2.0))
    linear.form = form
    torch.nn.init.eye_(linear.weight)
    x_NC = _currents(200, C).float()
    with torch.autocast("cpu", torch.bfloat16):
        y_NC = linear(x_NC)
    s_NC, gain = linear.neuron(x_NC)
    assert len(s_NC.unique()) == 2 * steps + 1
    # Float32 rounding alone: a third in bfloat16 would be off by 1e-3.
    torch.testing.assert_close(y_NC, s_NC * gain, rtol=1e-6, atol=0.0)


# Its gradient


def _slope(linear: SpikingLinear, x_NC: Tensor, step: float = 1e-6) -> float:
    """Central difference of the summed output in the logarithm of the threshold."""
    sums = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            linear.neuron.log_threshold.add_(sign * step)
            sums.append(linear(x_NC).sum().item())
            linear.neuron.log_threshold.sub_(sign * step)
    return (sums[0] - sums[1]) / (2.0 * step)


@pytest.mark.parametrize("kind", ["ternary", "binary", "quantised"])
@pytest.mark.parametrize("scale", ["token", "none"])
def test_above_the_range_the_output_is_the_threshold_and_so_is_its_slope(kind, scale):
    # The rectangle is 0 that far from the threshold, so the surrogate adds nothing: d(theta s)/d theta = s.
    linear = _linear(kind=kind, scale=scale, surrogate="rectangle", threshold=0.01)
    x_NC = _currents(N, C) + _currents(N, C).sign()
    linear(x_NC).sum().backward()
    gradient = linear.neuron.log_threshold.grad
    assert gradient is not None
    sign = x_NC.clamp_min(0.0).sign() if kind == "binary" else x_NC.sign()
    m = x_NC.abs().mean(-1, keepdim=True) if scale == "token" else 1.0
    closed = linear.neuron.threshold * (sign * m @ linear.weight.T).sum()
    torch.testing.assert_close(gradient, closed.detach(), rtol=1e-10, atol=1e-10)
    assert gradient.item() == pytest.approx(_slope(linear, x_NC), rel=1e-6)  # a smooth function here


@pytest.mark.parametrize("learn_threshold", ["layer", "channel"])
def test_the_quantised_twins_threshold_follows_its_rounding_error(learn_threshold):
    # LSQ: with a straight-through round, d(theta s)/d theta is s - x / (theta m) in range and s = +-1 beyond it.
    linear, x_NC = _linear(kind="quantised", learn_threshold=learn_threshold), _currents(N, C)
    linear(x_NC).sum().backward()
    m_N1 = x_NC.abs().mean(-1, keepdim=True)
    theta = linear.neuron.threshold.detach()
    wanted = x_NC / (theta * m_N1)
    s = (wanted.clamp(-1.0, 1.0) * 4).round() / 4
    assert 0 < (wanted.abs() > 1).sum() < wanted.numel()
    error = torch.where(wanted.abs() > 1, s, s - wanted) * theta * m_N1 * linear.weight.detach().sum(0)
    expected = error.sum(0) if learn_threshold == "channel" else error.sum()
    assert linear.neuron.log_threshold.grad is not None
    torch.testing.assert_close(linear.neuron.log_threshold.grad, expected, rtol=1e-10, atol=1e-10)


def test_the_quantised_twin_is_straight_through_in_range_and_flat_beyond_it():
    neuron = _neuron(kind="quantised", scale="none")
    x_NC = _currents(N, C).requires_grad_()
    s_NC, gain = neuron(x_NC)
    (s_NC * gain).sum().backward()
    assert x_NC.grad is not None
    assert torch.equal(x_NC.grad, (x_NC.detach().abs() < gain).double())


def test_a_surrogate_moves_the_threshold_of_a_silent_neuron_down():
    linear = _linear(kind="ternary", threshold=5.0, scale="none", surrogate="atan")
    x_NC = torch.full((1, C), 0.9, dtype=torch.float64)
    torch.nn.init.ones_(linear.weight)
    (-linear(x_NC).sum()).backward()  # a loss that wants more
    gradient = linear.neuron.log_threshold.grad
    assert not linear(x_NC).any() and gradient is not None and gradient > 0


@pytest.mark.parametrize("shape", ["layer", "channel"])
def test_a_learned_decay_starts_where_it_is_told_and_learns(shape):
    neuron = Neuron(C, _settings(learn_decay=shape, decay=0.8, detach_reset=False)).double()
    assert neuron.decay_logit is not None
    assert neuron.decay_logit.shape == (() if shape == "layer" else (C,))
    torch.testing.assert_close(torch.as_tensor(neuron.decay), torch.full_like(neuron.decay_logit, 0.8))
    neuron(_currents(N, C))[0].sum().backward()
    assert neuron.decay_logit.grad is not None and neuron.decay_logit.grad.abs().min() > 0


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_without_a_finite_logit_cannot_be_learned(decay):
    with pytest.raises(ValidationError, match=rf"decay {decay} cannot be learned .learn_decay layer.*between 0 and 1"):
        _neuron(learn_decay="layer", decay=decay)


# What it records


@pytest.mark.parametrize("form", ["rate", "steps"])
@pytest.mark.parametrize("keys", [{"steps": 4}, {"steps": 13, "kind": "binary"}])
def test_recorded_counts_are_those_of_every_call_since_the_start(form, keys):
    linear = _linear(**keys)
    linear.form = form
    linear(_currents(N, C, seed=5))  # before the start: not counted
    calls = [_currents(N, C), _currents(2, 3, C, seed=1)]
    calls[0][:, 0], calls[1][..., 0] = 1e-9, 0.0  # a channel that never fires
    calls[0][:, 1], calls[1][..., 1] = 99.0, 99.0  # one that always does
    linear.neuron.start_recording()
    for x in calls:
        linear(x)
    statistics = linear.neuron.stop_recording()
    linear(_currents(N, C))
    counts = np.concatenate([_counts(x.reshape(-1, C), linear.neuron)[0] for x in calls])
    assert statistics.values == N + 6
    np.testing.assert_array_equal(statistics.spikes_C.numpy(), np.abs(counts).sum(0))
    np.testing.assert_array_equal(statistics.nonzero_C.numpy(), (counts != 0).sum(0))
    np.testing.assert_array_equal(statistics.full_C.numpy(), (np.abs(counts) == keys["steps"]).sum(0))
    assert statistics.nonzero_C[0] == 0 and statistics.full_C[1] == statistics.values

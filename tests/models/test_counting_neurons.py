"""Neurons that count at once (integer, radix) against scalar loops over their micro-steps, and annealed ones.

Shapes: N tokens, C channels, O outputs, T micro-steps.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.config.annealing import Annealed
from asnn_goose.config.schema import NeuronConfig
from asnn_goose.models.counts import digits, levels
from asnn_goose.models.spiking import Neuron, SpikingLinear, anneal

N, C, O = 9, 6, 5  # noqa: E741


def _neuron(**keys) -> Neuron:
    return Neuron(C, NeuronConfig(**{"kind": "radix", "threshold": 2.0, **keys}).model_dump()).double()


def _currents(seed: int = 0) -> Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _halving_spikes(u: float, steps: int, offset: float) -> list[int]:
    """One membrane, charged once, whose threshold halves from micro-step to micro-step."""
    v, fired = min(abs(u), 1.0) * (2**steps - 1) + offset, []
    for t in range(steps):
        weight = 2 ** (steps - 1 - t)
        fired.append(int(v >= weight) * (1 if u > 0 else -1))
        v -= weight * abs(fired[-1])
    return fired


def _balanced_spikes(u: float, steps: int) -> list[int]:
    """One membrane, charged once, that fires either way; each weight is as much as the later ones and one half can
    make good on either side."""
    v, fired = max(-1.0, min(u, 1.0)) * sum(3**t for t in range(steps)), []
    for t in range(steps):
        weight = 3 ** (steps - 1 - t)
        fired.append(0 if abs(v) < weight / 2 else 1 if v > 0 else -1)
        v -= weight * fired[-1]
    return fired


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("base", "offset"), [(2, 0.0), (2, 0.5), (3, 0.0)])
@pytest.mark.parametrize("silence", [0.0, 0.7])
def test_radix_spikes_are_those_of_a_membrane_whose_threshold_falls(steps, base, offset, silence):
    neuron, x_NC = _neuron(steps=steps, base=base, offset=offset, silence=silence), 2.0 * _currents()
    scale_N = x_NC.abs().mean(-1).numpy()
    wanted = np.zeros((steps, N, C))
    for n, c in np.ndindex(N, C):
        u = x_NC[n, c].item() / float(scale_N[n]) / neuron.threshold.item()
        if abs(u) >= silence / 2.0:
            wanted[:, n, c] = _halving_spikes(u, steps, offset) if base == 2 else _balanced_spikes(u, steps)
    assert 0.0 < (wanted != 0).mean() < 1.0
    neuron.start_recording()
    spikes_TNC, gain = neuron.spikes(x_NC)
    np.testing.assert_array_equal(spikes_TNC.detach().numpy(), wanted)
    weights_T = float(base) ** np.arange(steps)[::-1] / sum(base**t for t in range(steps))
    s_NC, same_gain = neuron(x_NC)
    np.testing.assert_allclose(s_NC.detach().numpy(), np.tensordot(weights_T, wanted, 1), rtol=1e-15)
    np.testing.assert_allclose(gain.detach()[:, 0].numpy(), neuron.threshold.item() * scale_N, rtol=1e-15)
    assert torch.equal(gain, same_gain)
    counts = neuron.stop_recording()
    # Recorded twice, once from the micro-steps and once from their weighted mean.
    assert counts.values == 2 * N
    np.testing.assert_array_equal(counts.spikes_C.numpy(), 2 * np.abs(wanted).sum((0, 1)))
    np.testing.assert_array_equal(counts.nonzero_C.numpy(), 2 * np.abs(wanted).any(0).sum(0))
    np.testing.assert_array_equal(counts.full_C.numpy(), 2 * np.abs(wanted).all(0).sum(0))


@pytest.mark.parametrize(("base", "steps"), [(2, 1), (2, 8), (3, 1), (3, 5)])
def test_the_digits_of_every_count_add_up_to_it(base, steps):
    weights_T = base ** np.arange(steps)[::-1]
    counts_K = torch.arange(levels("radix", steps, base) + 1)
    digits_TK = digits(counts_K.double(), steps, base).numpy()
    assert set(np.unique(digits_TK)) <= ({0, 1} if base == 2 else {-1, 0, 1})
    np.testing.assert_array_equal(weights_T @ digits_TK, counts_K.numpy())
    # bfloat16 holds whole numbers up to 256, and one more micro-step goes beyond.
    assert (base, steps + 1) in [(2, 2), (3, 2)] or levels("radix", steps + 1, base) > 256


@settings(max_examples=60)
@given(current=st.floats(-3.0, 3.0), steps=st.integers(1, 8), offset=st.sampled_from([0.0, 0.5]))
def test_an_integer_neuron_is_the_ternary_one(current, steps, offset):
    # At a tie the running sum of T currents and one product with T may round to different sides.
    u = steps * abs(current) + offset
    assume(abs(u - round(u)) > 1e-9)
    keys = {"steps": steps, "offset": offset, "threshold": 1.0, "scale": "none"}
    x = torch.full((1, C), current, dtype=torch.float64)
    integer, ternary = _neuron(kind="integer", **keys), _neuron(kind="ternary", **keys)
    torch.testing.assert_close(integer(x)[0], ternary(x)[0], rtol=0, atol=1e-12)
    assert torch.equal(integer.spikes(x)[0], ternary.spikes(x)[0])


@pytest.mark.parametrize("kind", ["integer", "radix", "quantised"])
def test_gradient_is_one_within_the_range_and_zero_beyond(kind):
    neuron = _neuron(kind=kind, scale="none", silence=0.3)
    x_NC = (4.0 * _currents()).requires_grad_()
    s_NC, _ = neuron(x_NC)
    within = (x_NC.abs() <= 2.0).double()
    assert 0.0 < within.mean() < 1.0
    (grad_NC,) = torch.autograd.grad(s_NC.sum(), x_NC)
    torch.testing.assert_close(grad_NC, within / 2.0)


@pytest.mark.parametrize("kind", ["integer", "radix"])
@pytest.mark.parametrize("steps", [3, 4])
def test_micro_steps_multiply_to_what_their_sum_does(kind, steps):
    linear = SpikingLinear(C, O, NeuronConfig(kind=kind, steps=steps, offset=0.5, silence=0.2).model_dump()).double()
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(1))
    x_NC = _currents()
    at_once = linear(x_NC)
    linear.form = "steps"
    torch.testing.assert_close(linear(x_NC), at_once, rtol=1e-12, atol=1e-12)


def test_an_annealed_neuron_mixes_in_the_current_and_evaluation_sees_none_of_it():
    neuron, x_NC = _neuron(kind="ternary", threshold=1.0, scale="none", steps=4), _currents()
    plain, gain = neuron(x_NC)
    anneal(neuron, Annealed(mix=0.25, threshold=0.5))
    halved = _neuron(kind="ternary", threshold=0.5, scale="none", steps=4)
    spikes, _ = halved(x_NC)
    mixed, half_gain = neuron(x_NC)
    torch.testing.assert_close(mixed, 0.25 * spikes + 0.75 * x_NC / 0.5)
    torch.testing.assert_close(half_gain, gain * 0.5)
    assert torch.equal(neuron.eval()(x_NC)[0], plain)


@pytest.mark.parametrize("keys", [{"kind": "integer"}, {"base": 2}, {"base": 3}, {"kind": "quantised"}])
def test_an_annealed_threshold_of_a_count_is_that_of_a_neuron_with_it(keys):
    neuron, x_NC = _neuron(threshold=1.0, **keys), _currents()
    plain, _ = neuron(x_NC)
    anneal(neuron, Annealed(threshold=2.0))
    (s_NC, gain), (wanted_NC, wanted_gain) = neuron(x_NC), _neuron(threshold=2.0, **keys)(x_NC)
    # The logarithm of 2 starts as a float32.
    torch.testing.assert_close(gain, wanted_gain, rtol=1e-7, atol=0.0)
    assert torch.equal(s_NC, wanted_NC) and not torch.equal(s_NC, plain)
    assert torch.equal(neuron.eval()(x_NC)[0], plain)


@pytest.mark.parametrize(
    ("surrogate", "own", "width"),
    [("rectangle", None, 1.0), ("atan", None, 1.0), ("sigmoid", None, 0.25), ("sigmoid", 2.0, 2.0)],
)
def test_annealed_steps_and_width(surrogate, own, width):
    shared = {"kind": "ternary", "threshold": 1.0, "scale": "none", "surrogate": surrogate}
    neuron, x_NC = _neuron(steps=2, width=own, **shared), _currents()
    anneal(neuron, Annealed(steps=2, width=3.0))
    wide = _neuron(steps=4, width=3.0 * width, **shared)
    x_NC.requires_grad_()
    for s_NC in (neuron(x_NC)[0], wide(x_NC)[0]):
        (grad_NC,) = torch.autograd.grad(s_NC.sum(), x_NC)
        x_NC.grad = grad_NC if x_NC.grad is None else x_NC.grad - grad_NC
    assert torch.equal(neuron(x_NC)[0], wide(x_NC)[0])
    assert not bool(x_NC.grad.any())

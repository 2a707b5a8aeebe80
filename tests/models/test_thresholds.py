"""Thresholds set from data: the share of silent operands that comes out is the one asked for."""

import pytest
import torch

from asnn_goose.config.schema import NeuronConfig
from asnn_goose.models.spiking import SpikingLinear
from asnn_goose.models.thresholds import fitting_thresholds

TOKENS, C = 400, 32


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "ternary"},
        {"kind": "ternary", "offset": 0.5},
        {"kind": "ternary", "scale": "none", "steps": 1},
        {"kind": "ternary", "decay": 0.7, "steps": 6},
        {"kind": "binary"},
        {"kind": "integer", "offset": 0.5, "threshold": 1.0},
        {"kind": "radix", "offset": 0.5, "threshold": 3.0},
        {"kind": "quantised", "scale": "none", "threshold": 1.0},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
@pytest.mark.parametrize("sparsity", [0.65, 0.9])
def test_silence_comes_out_as_asked_for(keys, sparsity):
    x_NC = torch.randn(TOKENS, C, generator=torch.Generator().manual_seed(0))
    linear = SpikingLinear(C, 4, NeuronConfig(sparsity=sparsity, **keys).model_dump())
    torch.nn.init.zeros_(linear.weight)
    with fitting_thresholds(linear):
        linear(x_NC)
    s_NC, _ = linear.neuron(x_NC)
    # The quantile is a value of the sample, which may fall on either side of its own threshold.
    assert (s_NC == 0).double().mean().item() == pytest.approx(sparsity, abs=3 / x_NC.numel())


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_where_more_is_silent_than_asked_for_the_threshold_stays(kind):
    """Behind relu^2 half of the currents are 0; a threshold of 0 would give outputs of 0 and endless gradients."""
    x_NC = torch.randn(TOKENS, C, generator=torch.Generator().manual_seed(0)).relu().square().requires_grad_()
    linear = SpikingLinear(C, 4, NeuronConfig(kind=kind, sparsity=0.3, threshold=0.8).model_dump())
    torch.nn.init.ones_(linear.weight)
    with fitting_thresholds(linear):
        linear(x_NC).square().sum().backward()
    assert linear.neuron.threshold.item() == pytest.approx(0.8)
    assert all(p.grad is None or p.grad.isfinite().all() for p in [x_NC, *linear.parameters()])


def test_neurons_without_a_target_keep_theirs():
    linear = SpikingLinear(C, 4, NeuronConfig(threshold=1.7).model_dump())
    torch.nn.init.zeros_(linear.weight)
    with fitting_thresholds(linear):
        linear(torch.randn(TOKENS, C))
    assert linear.neuron.threshold.item() == pytest.approx(1.7)

"""The channel mix with dense neurons against its formula in numpy, its start, and the spikes behind relu^2."""

import numpy as np
import pytest
import torch

from asnn_goose.models import GooseConfig
from asnn_goose.models.channel_mix import ChannelMix, shifted

B, L, C = 2, 9, 12


def _mix(layer: int = 1, **keys) -> ChannelMix:
    return ChannelMix(GooseConfig(hidden_size=C, head_size=4, num_hidden_layers=3, **keys), layer).double()


def _random(**keys) -> ChannelMix:
    mix = _mix(**keys)
    with torch.no_grad():
        for number, parameter in enumerate(mix.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mix


def _input(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("started", [False, True])
def test_it_computes_the_published_formula(started):
    dense = {"kind": "dense"}
    mix, x_BLC = _random(neuron=dense, hidden_neuron=dense, channel_mix_size=20), _input()
    previous_BC = _input(seed=1)[:, 0] if started else None
    out_BLC, last_BC = mix(x_BLC, previous_BC)
    K, V, mu = (p.detach().numpy() for p in (mix.key.weight, mix.value.weight, mix.mix_C))
    assert K.shape == (20, C) and V.shape == (C, 20)
    for b in range(B):
        before = np.zeros(C) if previous_BC is None else previous_BC[b].numpy()
        for t, x in enumerate(x_BLC[b].numpy()):
            expected = V @ np.maximum(K @ (x + (before - x) * mu), 0.0) ** 2
            np.testing.assert_allclose(out_BLC[b, t].detach(), expected, rtol=1e-12, atol=1e-12)
            before = x
    assert torch.equal(last_BC, x_BLC[:, -1])


def test_a_token_sees_its_predecessor():
    x_BLC = _input()
    assert torch.equal(shifted(x_BLC, None)[:, 1:], x_BLC[:, :-1])
    assert not shifted(x_BLC, None)[:, 0].any()
    assert torch.equal(shifted(x_BLC, x_BLC[:, 3])[:, 0], x_BLC[:, 3])


@pytest.mark.parametrize("layer", [0, 2])
def test_it_starts_as_rwkv_7_does(layer):
    mix = _mix(layer)
    expected = [1.0 - (c / C) ** ((1.0 - layer / 3) ** 4) for c in range(C)]
    np.testing.assert_allclose(mix.mix_C.detach(), expected, rtol=1e-6, atol=1e-6)  # drawn in float32
    torch.testing.assert_close(mix.key.weight.T @ mix.key.weight, torch.eye(C).double(), rtol=0, atol=1e-5)
    assert mix.key.weight.shape == (4 * C, C)
    assert not mix.value.weight.any() and not mix(_input())[0].any()


def test_relu_squared_makes_the_second_neurons_spikes_count_upwards():
    mix = _random()
    seen = []
    mix.value.neuron.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    mix(_input())
    assert seen[0].min() == 0.0 and seen[0].max() == 1.0

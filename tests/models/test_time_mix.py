"""One layer's time mix with dense neurons against the published formulas in numpy float64, and RWKV-7's start.

Shapes: B batch, L tokens, C channels, H heads, D channels of a head.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from asnn_goose.kernels.unit_length import unit_length
from asnn_goose.models import GooseConfig
from asnn_goose.models.time_mix import TimeMix, TimeMixState, low_rank

B, L, C, D = 2, 19, 24, 8
H = C // D


def _config(**keys) -> GooseConfig:
    dense = {"kind": "dense"}
    return GooseConfig(**{"hidden_size": C, "head_size": D, "num_hidden_layers": 3, "neuron": dense, **keys})


def _random(layer: int, **keys) -> TimeMix:
    """Every parameter away from its start, in float64."""
    mix = TimeMix(_config(**keys), layer).double()
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in mix.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mix


def _input(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _by_hand(mix: TimeMix, x_LC, previous_C, S_HDD, v_first_LC):
    """Token by token and head by head for one sequence: (output_LC, last state_HDD, values_LC before blending)."""
    p = {name: value.detach().numpy() for name, value in mix.named_parameters()}

    def product(name, x, activation=lambda z: z):
        return p[f"{name}.up"] @ activation(p[f"{name}.down"] @ x)

    out, values, S = [], [], S_HDD.copy()
    for t, x in enumerate(x_LC):
        change = (x_LC[t - 1] if t else previous_C) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * p[f"mix_{name}_C"] for name in "rwkvag")
        r, k, v = p["receptance.weight"] @ x_r, p["key.weight"] @ x_k, p["value.weight"] @ x_v
        w = np.exp(-math.exp(-0.5) * _sigmoid(p["decay.bias_C"] + product("decay", x_w, np.tanh)))
        a = _sigmoid(p["rate.bias_C"] + product("rate", x_a))
        # Ours: the gate has a bias, which starts at 1.
        g = p["gate.bias_C"] + product("gate", x_g, _sigmoid)
        values.append(v)
        if v_first_LC is not None:
            v = v + (v_first_LC[t] - v) * _sigmoid(p["value_residual.bias_C"] + product("value_residual", x_v))
        kappa = k * p["removal_C"]
        k = k * (1.0 + (a - 1.0) * p["key_rate_C"])
        y = np.empty(C)
        for h in range(H):
            at = slice(h * D, (h + 1) * D)
            unit = kappa[at] / np.linalg.norm(kappa[at])
            S[h] = S[h] @ (np.diag(w[at]) - np.outer(unit, unit * a[at])) + np.outer(v[at], k[at])
            head = S[h] @ r[at]
            head = (head - head.mean()) / np.sqrt(head.var() + 64e-5)
            bonus = (r[at] * k[at] * p["bonus_HD"][h]).sum()
            y[at] = head * p["norm_weight_C"][at] + p["norm_bias_C"][at] + bonus * v[at]
        out.append(p["output.weight"] @ (y * g))
    return np.stack(out), S, np.stack(values)


# The formulas


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("backend", ["reference", "torch_chunk"])
@pytest.mark.parametrize("started", [False, True])
def test_a_layer_computes_the_published_formulas(layer, backend, started):
    mix, x_BLC = _random(layer, wkv_backend=backend, wkv_chunk=5), _input()
    v_first_BLC = None if layer == 0 else _input(seed=1)
    previous_BC, S_BHDD = torch.zeros(B, C, dtype=torch.float64), torch.zeros(B, H, D, D, dtype=torch.float64)
    if started:
        previous_BC, S_BHDD = _input(seed=2)[:, 0], _input(seed=3)[:, :D].reshape(B, H, D, D)
    state = TimeMixState(previous_BC, S_BHDD) if started else None
    out_BLC, new, values_BLC = mix(x_BLC, state, v_first_BLC)
    for b in range(B):
        v_first_LC = None if v_first_BLC is None else v_first_BLC[b].numpy()
        out_LC, S_HDD, values_LC = _by_hand(
            mix, x_BLC[b].numpy(), previous_BC[b].numpy(), S_BHDD[b].numpy(), v_first_LC
        )
        # Sums of some tens of terms in float64, in another order.
        np.testing.assert_allclose(out_BLC[b].detach(), out_LC, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(new.wkv_BHDD[b].detach(), S_HDD, rtol=1e-9, atol=1e-9)
        expected_LC = values_LC if v_first_LC is None else v_first_LC
        np.testing.assert_allclose(values_BLC[b].detach(), expected_LC, rtol=1e-12, atol=1e-12)
    assert torch.equal(new.previous_BC, x_BLC[:, -1])


@pytest.mark.parametrize("form", ["goose", "converted"])
@pytest.mark.parametrize("silent", ["receptance", "key"])
def test_a_token_without_a_spike_gives_no_gradient_instead_of_an_endless_one(form, silent):
    spiking = {"kind": "radix", "base": 3, "steps": 1, "threshold": 2.0, "decay": 1.0, "scale": "token"}
    mix = _random(0, neuron=spiking, time_mix=form)
    mix.get_parameter(f"{silent}.neuron.log_threshold").data.fill_(math.log(1e3))
    x_BLC = _input().requires_grad_()
    mix(x_BLC)[0].sum().backward()
    # Divided by a length of 1e-12 it would be 1e13.
    assert x_BLC.grad is not None and x_BLC.grad.abs().max() < 1e5


@given(arrays(np.float64, (3, 5), elements=st.floats(-1e3, 1e3).filter(lambda x: x == 0.0 or abs(x) > 1e-3)))
def test_unit_length_is_the_direction(x):
    expected = np.stack([row / np.linalg.norm(row) if row.any() else row for row in x])
    np.testing.assert_allclose(unit_length(torch.tensor(x)), expected, rtol=1e-12, atol=0)


def test_unit_length_of_what_is_no_number_is_none():
    assert unit_length(torch.tensor([[1.0, torch.nan], [0.0, 0.0]])).isnan().any(-1).tolist() == [True, False]


def test_the_first_layers_values_are_the_ones_handed_on():
    first, later = _random(0), _random(1)
    x_BLC = _input()
    _, _, v_first_BLC = first(x_BLC)
    torch.testing.assert_close(
        v_first_BLC, first.value(torch.lerp(x_BLC, _shifted(x_BLC), first.get_parameter("mix_v_C")))
    )
    assert first.value_residual is None
    assert later(x_BLC, None, v_first_BLC)[2] is v_first_BLC


def _shifted(x_BLC):
    return torch.cat([torch.zeros_like(x_BLC[:, :1]), x_BLC[:, :-1]], 1)


# The start


@pytest.mark.parametrize(("layer", "layers"), [(0, 3), (1, 3), (2, 3), (0, 1)])
def test_it_starts_as_rwkv_7_does(layer, layers):
    mix = TimeMix(_config(num_hidden_layers=layers), layer)
    p = {name: value.detach().double().numpy() for name, value in mix.named_parameters()}
    assert all(np.isfinite(value).all() for value in p.values())
    rising = layer / (layers - 1) if layers > 1 else 0.0  # one layer divides by zero in the public code
    remaining = 1.0 - layer / layers
    powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    for c in range(C):
        linear = c / (C - 1) - 0.5
        within = (c % D - (D - 1) / 2) / ((D - 1) / 2)
        zigzag = within * abs(within)
        expected = {f"mix_{name}_C": 1.0 - (c / C) ** (power * remaining) for name, power in powers.items()} | {
            "decay.bias_C": -6.0 + 6.0 * (c / (C - 1)) ** (1.0 + rising**0.3) + 0.5 + 2.5 * zigzag,
            "rate.bias_C": -0.19 + 0.3 * zigzag + 0.4 * linear,
            "removal_C": 0.71 - 0.1 * linear,
            "key_rate_C": 1.02,
            "norm_weight_C": ((1 + layer) / layers) ** 0.7,
            "norm_bias_C": 0.0,
            "gate.bias_C": 1.0,
        }
        if layer:
            expected["value_residual.bias_C"] = 0.73 - 0.4 * linear
        for name, value in expected.items():
            assert p[name][c] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, c)  # float32
    np.testing.assert_allclose(p["bonus_HD"], -0.04, rtol=1e-6)
    assert ("value_residual.bias_C" in p) == (layer > 0)


def test_matrices_start_orthogonal_with_rwkv_7s_gains():
    mix = TimeMix(_config(), 1)
    for linear, gain in ((mix.receptance, 1.0), (mix.key, 0.1), (mix.value, 1.0), (mix.output, 0.0)):
        torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * torch.eye(C), rtol=0, atol=1e-5)
    assert mix.value_residual is not None
    for product in (mix.decay, mix.rate, mix.value_residual, mix.gate):
        rank = product.down.shape[0]
        assert not product.down.any()
        assert product.up.shape == (C, rank)
        torch.testing.assert_close(product.up.T @ product.up, 0.01 * torch.eye(rank), rtol=0, atol=1e-6)


def test_the_block_starts_as_the_identity():
    out_BLC, _, _ = TimeMix(_config(), 0)(_input().float())
    assert not out_BLC.any()


@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_a_narrow_students_low_ranks_stay_below_its_width(width):
    ranks = {factor: low_rank(width, factor, power) for factor, power in ((1.8, 0.5), (1.3, 0.5), (0.6, 0.8))}
    # RWKV-7's floor of 32 on all three would cost more than a matrix of width 64 or less.
    assert all(rank % 8 == 0 and 8 <= rank < width for rank in ranks.values())
    assert 2 * width * (2 * ranks[1.8] + ranks[1.3] + ranks[0.6]) < 4 * width**2


def test_ranks_follow_the_published_rule_in_steps_of_eight():
    # By hand: 1.8 sqrt(576) = 43.2, 1.3 sqrt(576) = 31.2, 0.6 576^0.8 = 96.9.
    assert [low_rank(576, 1.8, 0.5), low_rank(576, 1.3, 0.5), low_rank(576, 0.6, 0.8)] == [40, 32, 96]
    assert low_rank(2, 1.8, 0.5) == 8

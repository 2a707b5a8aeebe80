"""What a converted student is made of, by hand in numpy float64: its time mix, its gated channel mix, its membranes.

Shapes: B batch, L tokens, C channels, H heads, D channels of a head, F hidden channels, T micro-steps, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asnn_goose.config.schema import NeuronConfig, StudentConfig
from asnn_goose.kernels.lif import lif, lif_rate
from asnn_goose.models import GooseConfig, GooseForCausalLM, build_student
from asnn_goose.models.channel_mix import ChannelMix
from asnn_goose.models.spiking import Neuron, SpikingLinear
from asnn_goose.models.time_mix import TimeMix, TimeMixState

B, L, C, D, V = 2, 19, 24, 8, 257
H = C // D


def _config(**keys) -> GooseConfig:
    dense = {"kind": "dense"}
    shape = {"hidden_size": C, "head_size": D, "num_hidden_layers": 3, "channel_mix_size": 20}
    forms = {"time_mix": "converted", "channel_mix": "gated", "neuron": dense, "hidden_neuron": dense}
    return GooseConfig(**{**shape, **forms, **keys})


def _random(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start, in float64."""
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def _time_mix(layer: int, **keys) -> TimeMix:
    mix = _random(TimeMix(_config(**keys), layer))
    assert isinstance(mix, TimeMix)
    return mix


def _channel_mix(**keys) -> ChannelMix:
    mix = _random(ChannelMix(_config(**keys), 1))
    assert isinstance(mix, ChannelMix)
    return mix


def _input(seed: int = 0) -> Tensor:
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# The time mix


def _by_hand(mix: TimeMix, x_LC, previous_C, S_HDD):
    """Token by token and head by head for one sequence: (output_LC, last state_HDD)."""
    p = {name: value.detach().numpy() for name, value in mix.named_parameters()}

    def product(name, x, activation=lambda z: z):
        return p[f"{name}.bias_C"] + p[f"{name}.up"] @ activation(p[f"{name}.down"] @ x)

    def unit(x):
        return x / np.linalg.norm(x)

    out, S = [], S_HDD.copy()
    for t, x in enumerate(x_LC):
        change = (x_LC[t - 1] if t else previous_C) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * p[f"mix_{name}_C"] for name in "rwkvag")
        r, k, v = p["receptance.weight"] @ x_r, p["key.weight"] @ x_k, p["value.weight"] @ x_v
        w = np.exp(-math.exp(-0.5) * _sigmoid(product("decay", x_w, np.tanh)))
        a = _sigmoid(product("rate", x_a))
        g = product("gate", x_g, _sigmoid)
        kappa = k * p["removal_C"]
        k = k * (1.0 + (a - 1.0) * p["key_rate_C"])
        y = np.empty(C)
        for h in range(H):
            at = slice(h * D, (h + 1) * D)
            removed, r_D, k_D = unit(kappa[at]), unit(r[at]), unit(k[at])
            S[h] = S[h] @ (np.diag(w[at]) - np.outer(removed, removed * a[at])) + np.outer(v[at], k_D)
            y[at] = S[h] @ r_D + (r_D * k_D * p["bonus_HD"][h]).sum() * v[at]
        out.append(p["output.weight"] @ (y * g) + p["output_bias_C"])
    return np.stack(out), S


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("backend", ["reference", "torch_chunk"])
@pytest.mark.parametrize("started", [False, True])
def test_a_converted_layer_computes_its_formulas(layer, backend, started):
    mix, x_BLC = _time_mix(layer, wkv_backend=backend, wkv_chunk=5), _input()
    # A first layer's values go through untouched and are not blended in.
    v_first_BLC = None if layer == 0 else _input(seed=1)
    previous_BC, S_BHDD = torch.zeros(B, C, dtype=torch.float64), torch.zeros(B, H, D, D, dtype=torch.float64)
    if started:
        previous_BC, S_BHDD = _input(seed=2)[:, 0], _input(seed=3)[:, :D].reshape(B, H, D, D)
    out_BLC, new, values_BLC = mix(x_BLC, TimeMixState(previous_BC, S_BHDD) if started else None, v_first_BLC)
    for b in range(B):
        out_LC, S_HDD = _by_hand(mix, x_BLC[b].numpy(), previous_BC[b].numpy(), S_BHDD[b].numpy())
        # Sums of some tens of terms in float64, in another order.
        np.testing.assert_allclose(out_BLC[b].detach(), out_LC, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(new.wkv_BHDD[b].detach(), S_HDD, rtol=1e-9, atol=1e-9)
    assert torch.equal(new.previous_BC, x_BLC[:, -1])
    assert v_first_BLC is None or values_BLC is v_first_BLC


@pytest.mark.parametrize("name", ["receptance", "key"])
def test_the_length_of_queries_and_keys_does_not_matter(name):
    mix, x_BLC = _time_mix(1), _input()
    before, _, _ = mix(x_BLC)
    with torch.no_grad():
        # A power of two, so that only the norm itself rounds otherwise; one factor for each head.
        mix.get_submodule(name).get_parameter("weight").view(H, -1).mul_(torch.tensor([[0.25], [4.0], [64.0]]))
    torch.testing.assert_close(mix(x_BLC)[0], before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_converted_layer_starts_without_shift_norm_and_value_residual(layer):
    ours, published = TimeMix(_config(), layer), TimeMix(_config(time_mix="goose"), layer)
    names = dict(ours.named_parameters()).keys()
    assert dict(published.named_parameters()).keys() - names == {"norm_weight_C", "norm_bias_C"} | (
        {f"value_residual.{part}" for part in ("down", "up", "bias_C")} if layer else set()
    )
    assert names - dict(published.named_parameters()).keys() == {"output_bias_C"}
    assert not any(ours.get_parameter(f"mix_{name}_C").any() for name in "rkv")
    for name in ("mix_w_C", "mix_a_C", "mix_g_C", "decay.bias_C", "rate.bias_C", "gate.bias_C"):
        assert torch.equal(ours.get_parameter(name), published.get_parameter(name))
    assert not ours(_input().float())[0].any()


# The gated channel mix


@pytest.mark.parametrize("started", [False, True])
def test_the_gated_channel_mix_is_a_gated_mlp_of_the_shifted_input(started):
    mix, x_BLC = _channel_mix(), _input()
    previous_BC = _input(seed=1)[:, 0] if started else None
    out_BLC, last_BC = mix(x_BLC, previous_BC)
    K, down, mu = (p.detach().numpy() for p in (mix.key.weight, mix.value.weight, mix.mix_C))
    assert K.shape == (40, C) and down.shape == (C, 20)
    gate, up = K[:20], K[20:]
    for b in range(B):
        before = np.zeros(C) if previous_BC is None else previous_BC[b].numpy()
        for t, x in enumerate(x_BLC[b].numpy()):
            shifted = x + (before - x) * mu
            z = gate @ shifted
            expected = down @ (z * _sigmoid(z) * (up @ shifted))
            np.testing.assert_allclose(out_BLC[b, t].detach(), expected, rtol=1e-12, atol=1e-12)
            before = x
    assert torch.equal(last_BC, x_BLC[:, -1])


def test_gate_and_up_see_the_spikes_of_one_neuron():
    mix, x_BLC = _channel_mix(neuron={"threshold": 1.3}, hidden_neuron={"kind": "dense"}), _input()
    assert len([module for module in mix.modules() if isinstance(module, Neuron)]) == 2
    s_BLC, gain = mix.key.neuron(torch.lerp(x_BLC, F.pad(x_BLC, (0, 0, 1, -1)), mix.mix_C))
    operand_BLC = s_BLC * gain
    gate_BLF, up_BLF = (operand_BLC @ weight.T for weight in (mix.key.weight[:20], mix.key.weight[20:]))
    expected = (F.silu(gate_BLF) * up_BLF) @ mix.value.weight.T
    torch.testing.assert_close(mix(x_BLC)[0], expected, rtol=1e-12, atol=1e-12)


def test_the_gated_channel_mix_starts_without_shift_and_silent():
    mix = ChannelMix(_config(), 1)
    assert not mix.mix_C.any() and not mix.value.weight.any()
    assert not mix(_input().float())[0].any()


@pytest.mark.parametrize("keys", [{"time_mix": "softmax"}, {"channel_mix": "swiglu"}], ids=str)
def test_another_form_is_refused(keys):
    with pytest.raises(ValueError, match=r"time_mix must be goose or converted, not .*mix relu2 or gated, not"):
        _config(**keys)


# A whole student

SPIKES = {"threshold": 1.5, "offset": 0.5}
FORMS = {"time_mix": "converted", "channel_mix": "gated", "embedding_norm": False}
FORMS |= {"neuron": SPIKES, "hidden_neuron": SPIKES, "channel_mix_size": 40, "tie_word_embeddings": False}


def _ids(*shape: int, seed: int = 0, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("backend", "chunk"), [("reference", 32), ("torch_chunk", 7), ("torch_chunk", 32)])
@torch.no_grad()
def test_streaming_token_by_token_is_one_pass(make_student, backend, chunk):
    student = make_student(dtype=torch.float64, wkv_backend=backend, wkv_chunk=chunk, **FORMS)
    whole = student(_ids(2, 40)).logits
    state, pieces = None, []
    for ids_BL in _ids(2, 40).split([1] * 20 + [13, 7], 1):
        output = student(ids_BL, state=state)
        state = output.state
        pieces.append(output.logits)
    # float64: a spike that flips would show as some hundredths.
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    assert whole.std(1).mean() > 0.01


@torch.no_grad()
def _greedy(student: GooseForCausalLM, prompt_BL: Tensor, count: int) -> Tensor:
    """Argmax by full recomputation, without any state."""
    ids = prompt_BL
    for _ in range(count):
        ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompt_BL.shape[1] :]


def test_generate_is_argmax_by_recomputation_whatever_the_padding(make_student):
    student, long_L, short_L = make_student(dtype=torch.float64, **FORMS), _ids(9), _ids(4, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    found = student.generate(
        torch.stack([long_L, F.pad(short_L, (5, 0), value=7)]), attention_mask=mask, max_new_tokens=12,
        do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    for row, prompt_L in zip(found[:, 9:], (long_L, short_L), strict=True):
        assert torch.equal(row[None], _greedy(student, prompt_L[None], 12))
    assert len(found[:, 9:].unique()) > 4


def test_a_converted_teacher_is_saved_and_loaded_whole(make_teacher, tmp_path):
    settings = {"layers": 2, "head_size": 8, "init": "layers", "neuron": SPIKES, "hidden_neuron": SPIKES}
    ids_BL = _ids(4, 16, vocabulary=V)
    student = build_student(StudentConfig.model_validate(settings), make_teacher(), ids_BL, layers=(1, 2)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(student.model.blocks.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.01)
    student.save_pretrained(tmp_path)
    loaded = GooseForCausalLM.from_pretrained(tmp_path).eval()
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert (loaded.config.time_mix, loaded.config.channel_mix) == ("converted", "gated")
    assert not loaded.config.embedding_norm and loaded.config.neuron["offset"] == 0.5
    with torch.no_grad():
        assert torch.equal(loaded(ids_BL).logits, student(ids_BL).logits)


# The offset


def _neuron(channels: int = 1, **keys) -> Neuron:
    base = {"threshold": 1.0, "scale": "none", "learn_threshold": "fixed", "decay": 1.0}
    return Neuron(channels, NeuronConfig.model_validate(base | keys).model_dump()).double()


def _clear_of_ties(steps: int, u: float, offset: float) -> bool:
    """A running sum of T currents and one product with T may round to different sides of a whole number."""
    return abs(steps * abs(u) + offset - round(steps * abs(u) + offset)) > 1e-9


any_kind = st.sampled_from(["ternary", "binary"])


@settings(max_examples=80)
@given(st.floats(-6.0, 6.0), st.floats(0.3, 3.0), st.integers(1, 9), st.floats(0.0, 0.5), any_kind)
def test_a_membrane_that_starts_higher_rounds_up_sooner(x, theta, steps, offset, kind):
    """floor(T |x| / theta + offset), of at most T spikes; at 0.5 the nearest level."""
    neuron = _neuron(kind=kind, steps=steps, threshold=theta, offset=offset)
    theta = neuron.threshold.item()  # its logarithm was float32
    assume(_clear_of_ties(steps, x / theta, offset))
    s, _ = neuron(torch.tensor([[x]], dtype=torch.float64))
    expected = np.copysign(min(steps, np.floor(steps * abs(x) / theta + offset)), x)
    assert s.item() == (max(0.0, expected) if kind == "binary" else expected) / steps


@settings(max_examples=60)
@given(x=st.lists(st.floats(-4.0, 4.0), min_size=3, max_size=3), steps=st.integers(1, 9))
def test_half_an_offset_makes_ternary_spikes_the_quantised_twins(x, steps):
    x_C = torch.tensor([x], dtype=torch.float64)
    spiking, twin = (_neuron(3, kind=kind, steps=steps, offset=0.5, scale="token") for kind in ("ternary", "quantised"))
    units = (x_C / twin.gain(x_C))[0].tolist()
    assume(all(_clear_of_ties(steps, u, 0.5) for u in units))
    s, gain = spiking(x_C)
    found, twin_gain = twin(x_C)
    np.testing.assert_allclose(s, found, rtol=0, atol=1e-12)  # a sum of spikes over T, and a rounded product over T
    assert torch.equal(gain, twin_gain)


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_a_tie_is_rounded_away_from_zero(kind):
    # T = 4 and quarters of eighths: every number is exact in binary.
    u_N1 = torch.arange(-10.0, 11.0, dtype=torch.float64)[:, None] / 8.0
    s_N1, _ = _neuron(kind=kind, steps=4, offset=0.5)(u_N1)
    counts = np.copysign(np.minimum(4.0, np.floor(4.0 * np.abs(u_N1.numpy()) + 0.5)), u_N1.numpy())
    np.testing.assert_array_equal((4.0 * s_N1).numpy(), np.maximum(counts, 0.0) if kind == "binary" else counts)


@pytest.mark.parametrize("offset", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_spikes_are_as_many_as_from_a_membrane_that_starts_there(kind, steps, offset):
    x_NC = 1.2 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s_NC, _ = _neuron(kind=kind, steps=steps, offset=offset)(x_NC)
    currents_TNC = x_NC.expand(steps, *x_NC.shape)
    spikes_TNC, _ = lif(currents_TNC, threshold=1.0, decay=1.0, kind=kind, v0=offset * x_NC.sign())
    np.testing.assert_allclose(s_NC * steps, spikes_TNC.sum(0), rtol=0, atol=1e-12)
    plain, _ = _neuron(kind=kind, steps=steps)(x_NC)
    assert not torch.equal(plain, s_NC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [{"kind": "ternary"}, {"kind": "binary", "learn_threshold": "channel"}], ids=str)
@pytest.mark.parametrize("steps", [3, 4])
def test_micro_steps_one_by_one_are_the_rate(keys, steps, dtype):
    linear = SpikingLinear(C, 5, NeuronConfig(steps=steps, offset=0.5, threshold=1.5, **keys).model_dump())
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(9))
    linear, x_BLC = linear.to(dtype), _input().to(dtype)
    spikes_TBLC, gain = linear.neuron.spikes(x_BLC)
    s_BLC, rate_gain = linear.neuron(x_BLC)
    assert set(spikes_TBLC.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal((s_BLC * steps).round(), spikes_TBLC.sum(0)) and torch.equal(gain, rate_gain)
    rate = linear(x_BLC)
    linear.form = "steps"
    # The same counts, summed before the product or behind it.
    torch.testing.assert_close(linear(x_BLC), rate, rtol=0, atol=(1e-5 if dtype == torch.float32 else 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_no_offset_is_the_plain_membrane_bit_for_bit(kind, dtype):
    x_BLC = _input().to(dtype).requires_grad_()
    neuron = Neuron(C, NeuronConfig(kind=kind, threshold=1.3, decay=0.9).model_dump()).to(dtype)
    assert neuron.settings["offset"] == 0.0
    s_BLC, gain = neuron(x_BLC)
    expected = lif_rate(x_BLC / gain, 4, threshold=1.0, decay=0.9, kind=kind)
    assert torch.equal(s_BLC, expected)
    (grad,) = torch.autograd.grad(s_BLC.square().sum(), x_BLC, retain_graph=True)
    assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), x_BLC)[0]) and grad.any()


@pytest.mark.parametrize("kind", ["quantised", "dense"])
def test_an_offset_changes_nothing_where_there_is_no_membrane(kind):
    plain, moved = (_neuron(C, kind=kind, offset=offset)(_input())[0] for offset in (0.0, 0.5))
    assert torch.equal(plain, moved)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_current_of_zero_stays_silent(steps):
    for scale in ("token", "none"):
        x_NC = torch.zeros(2, C, dtype=torch.float64, requires_grad=True)
        s_NC, gain = _neuron(C, steps=steps, offset=0.5, scale=scale)(x_NC)
        assert not s_NC.any()
        (s_NC * gain).sum().backward()
        assert x_NC.grad is not None and x_NC.grad.isfinite().all()

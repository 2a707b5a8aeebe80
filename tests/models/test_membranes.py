"""Membranes that live on from token to token: against plain loops, SpikingJelly's neuron, and passes in one piece.

Shapes: B batch, L tokens, C channels, T micro-steps, V vocabulary.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from spikingjelly.activation_based import neuron as theirs
from spikingjelly.activation_based import surrogate
from torch import Tensor

from asnn_goose.config.schema import NeuronConfig
from asnn_goose.evaluation.energy import student_traffic
from asnn_goose.models import GooseForCausalLM
from asnn_goose.models.goose import LayerState
from asnn_goose.models.spiking import Membranes, Neuron, SpikingLinear

B, L, C, T, V = 2, 9, 5, 3, 50
MODEL = {
    "neuron": {"membrane": "sequence", "steps": T, "decay": 0.95, "detach_reset": False},
    "hidden_neuron": {"membrane": "sequence", "kind": "binary", "learn_threshold": "channel"},
}
KINDS = [
    {"kind": "ternary"},
    {"kind": "ternary", "scale": "none", "decay": 0.8},
    {"kind": "ternary", "reset": "hard", "learn_threshold": "channel"},
    {"kind": "binary", "decay": 0.9, "steps": 1},
    {"kind": "binary", "scale": "none"},
]
each_kind = pytest.mark.parametrize("keys", KINDS, ids=lambda keys: "-".join(map(str, keys.values())))


def _settings(**keys) -> dict:
    return NeuronConfig(**{"membrane": "sequence", "steps": T, "threshold": 1.3, **keys}).model_dump()


def _currents(*shape: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loop(neuron: Neuron, x_BLC: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(spikes [T, B, L, C], membranes [B, C] behind the last token), one membrane at a time."""
    s, x = neuron.settings, x_BLC.numpy()
    theta = np.broadcast_to(neuron.threshold.detach().numpy(), C)
    spikes, last = np.zeros((s["steps"], *x.shape)), np.zeros((len(x), C))
    for b, c in np.ndindex(last.shape):
        v = 0.0
        for token in range(x.shape[1]):
            scale = np.abs(x[b, token]).mean() if s["scale"] == "token" else 1.0
            for t in range(s["steps"]):
                v = s["decay"] * v + x[b, token, c] / (theta[c] * scale)
                spike = int(v >= 1.0) - int(v <= -1.0 and s["kind"] == "ternary")
                spikes[t, b, token, c] = spike
                v = v - spike if s["reset"] == "soft" else v * (spike == 0)
        last[b, c] = v
    return spikes, last


@each_kind
def test_spikes_are_those_of_one_membrane_per_sequence_and_channel(keys):
    neuron, x_BLC, membranes = Neuron(C, _settings(**keys)).double(), _currents(B, L, C), Membranes()
    expected, last_BC = _loop(neuron, x_BLC)
    assert 0.05 < (expected != 0).mean() < 0.95
    s_BLC, gain = neuron(x_BLC, membranes)
    np.testing.assert_array_equal(s_BLC.detach().numpy(), expected.sum(0) / neuron.steps)
    # Rounding of the gain, over 27 micro-steps.
    np.testing.assert_allclose(membranes.after[neuron].detach().numpy(), last_BC, rtol=0, atol=1e-12)
    spikes_TBLC, steps_gain = neuron.spikes(x_BLC)
    np.testing.assert_array_equal(spikes_TBLC.detach().numpy(), expected)
    assert torch.equal(gain, steps_gain)


@each_kind
def test_a_first_token_is_that_of_a_fresh_membrane_and_later_ones_are_not(keys):
    x_BLC = _currents(B, L, C)
    (living, _), (fresh, _) = (
        Neuron(C, _settings(**keys, membrane=membrane)).double()(x_BLC) for membrane in ("sequence", "token")
    )
    assert torch.equal(living[:, 0], fresh[:, 0]) and not torch.equal(living, fresh)


@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_spikingjellys_neuron_without_a_reset_between_tokens_has_the_same_gradients(reset, detach_reset, decay):
    keys = {"kind": "binary", "scale": "none", "decay": decay, "reset": reset, "detach_reset": detach_reset}
    neuron = Neuron(C, _settings(**keys, threshold=1.0, surrogate="atan", width=2.0)).double()
    common = {
        "v_threshold": 1.0, "v_reset": 0.0 if reset == "hard" else None, "detach_reset": detach_reset,
        "surrogate_function": surrogate.ATan(alpha=1.0),
    }  # fmt: skip
    node = theirs.IFNode(**common) if decay == 1.0 else theirs.LIFNode(1.0 / (1.0 - decay), False, **common)
    x_BLC, weights_BLC = _currents(B, L, C).requires_grad_(), _currents(B, L, C, seed=1)
    s_BLC, _ = neuron(x_BLC)
    expected_BLC = torch.stack([torch.stack([node(x_BC) for _ in range(T)]).mean(0) for x_BC in x_BLC.unbind(1)], 1)
    assert torch.equal(s_BLC, expected_BLC)
    ours, peers = (torch.autograd.grad((s * weights_BLC).sum(), x_BLC)[0] for s in (s_BLC, expected_BLC))
    torch.testing.assert_close(ours, peers, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("membrane", ["token", "sequence"])
def test_a_token_has_a_gradient_in_those_before_it_where_the_membrane_lives_on(membrane):
    x_BLC = _currents(B, L, C).requires_grad_()
    s_BLC, _ = Neuron(C, _settings(membrane=membrane)).double()(x_BLC)
    (grad_BLC,) = torch.autograd.grad(s_BLC[:, 4].sum(), x_BLC)
    assert grad_BLC[:, 4].all() and not grad_BLC[:, 5:].any()
    before_BLC = grad_BLC[:, :4]
    assert before_BLC.all() if membrane == "sequence" else not before_BLC.any()


@pytest.mark.parametrize("keys", [{}, {"reset": "hard"}, {"kind": "binary", "decay": 0.5}], ids=str)
def test_the_float32_kernel_is_the_reference_in_float64(keys):
    # Eighths, a threshold of 1 and a decay of 1 or 1/2: nothing is rounded, and no spike can flip.
    settings = _settings(**keys, threshold=1.0, scale="none", learn_threshold="fixed")
    x_BLC, weights_BLC = (_currents(B, 5, C) * 8.0).round() / 8.0, _currents(B, 5, C, seed=1)
    found = []
    for dtype in (torch.float64, torch.float32):
        x = x_BLC.to(dtype).requires_grad_()
        s_BLC, _ = Neuron(C, settings).to(dtype)(x)
        found.append((s_BLC.double(), torch.autograd.grad((s_BLC * weights_BLC).sum(), x)[0].double()))
    (s_BLC, grad_BLC), (narrow_BLC, narrow_grad_BLC) = found
    # A third is another number in float32.
    assert torch.equal((s_BLC * T).round(), (narrow_BLC * T).round())
    torch.testing.assert_close(narrow_grad_BLC, grad_BLC, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["rate", "steps"])
def test_every_spike_is_counted_also_where_two_of_a_token_cancel(form):
    linear = SpikingLinear(1, 1, _settings(scale="none", learn_threshold="fixed", threshold=1.0)).double()
    torch.nn.init.ones_(linear.weight)
    linear.form = form
    linear.neuron.start_recording()
    # Spikes +++, +--, -++ and none; what is left on the membrane is 3, -2, 0 and 0.
    y_BLO = linear(torch.tensor([2.0, -2.0, 1.0, 0.0], dtype=torch.float64).view(1, 4, 1))
    statistics = linear.neuron.stop_recording()
    assert (y_BLO * T).round().flatten().tolist() == [3.0, -1.0, 1.0, 0.0]
    counts = statistics.spikes_C, statistics.nonzero_C, statistics.full_C
    assert (statistics.values, *(count.item() for count in counts)) == (4, 9, 3, 3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kind": kind}, f"kind {kind}, which charges afresh at each token: set kind to ternary, or membrane")
        for kind in ("integer", "radix", "quantised", "dense")
    ]
    + [
        ({"offset": 0.5}, "offset 0.5, .*: set offset to 0, or membrane to token"),
        ({"sparsity": 0.6}, "sparsity 0.6, .*: set sparsity to null, or membrane to token"),
        ({"kind": "binary", "backend": "snntorch"}, "backend snntorch, .*: set backend to auto, or membrane to token"),
    ],
)
def test_what_a_membrane_that_lives_on_cannot_have_is_refused_by_name(keys, words):
    with pytest.raises(ValidationError, match=f"membrane sequence is not for {words}"):
        NeuronConfig(membrane="sequence", **keys)


# In a model


def _ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def _watch(student: GooseForCausalLM) -> list[list[Tensor]]:
    """For each neuron the spikes [B, L, C] of every call from now on."""
    seen: list[list[Tensor]] = []

    def into(calls: list[Tensor]):
        return lambda _module, _inputs, output: calls.append(output[0])

    for module in student.modules():
        if isinstance(module, Neuron):
            seen.append([])
            module.register_forward_hook(into(seen[-1]))
    return seen


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths", [[1] * 96, [40, *[1] * 56], [1, 7, 31, 33, 24]], ids=["tokens", "prefill", "pieces"]
)
def test_prefill_and_decoding_are_one_pass_to_the_spike(make_student, lengths):
    student, input_ids = make_student(dtype=torch.float64, **MODEL), _ids(2, 96)
    seen = _watch(student)
    whole_BLV = student(input_ids).logits
    parallel = [calls.pop() for calls in seen]
    state: list[LayerState] | None = None
    logits = []
    for part in input_ids.split(lengths, 1):
        output = student(part, state=state)
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole_BLV, rtol=0, atol=1e-9)
    assert len(parallel) == 12 and state is not None
    for whole_BLC, calls in zip(parallel, seen, strict=True):
        assert 0.0 < (whole_BLC != 0).double().mean() < 1.0
        assert torch.equal(torch.cat(calls, 1), whole_BLC)
    fresh = [layer._replace(membranes_BC=tuple(map(torch.zeros_like, layer.membranes_BC))) for layer in state]
    more = _ids(2, 1, seed=1)
    assert not torch.equal(student(more, state=state).logits, student(more, state=fresh).logits)


@torch.no_grad()
def test_nothing_leaks_between_batches_or_within_one(make_student):
    student, input_ids = make_student(dtype=torch.float64, **MODEL), _ids(4, 33)
    logits_BLV = student(input_ids).logits
    student(_ids(4, 33, seed=1))
    assert torch.equal(student(input_ids).logits, logits_BLV)
    alone = torch.cat([student(row[None]).logits for row in input_ids])
    # Rows of one product may sum in another order.
    torch.testing.assert_close(alone, logits_BLV, rtol=0, atol=1e-12)


@torch.no_grad()
def test_padding_on_the_left_leaves_membranes_at_0_as_it_does_the_recurrent_state(make_student):
    # Behind the group norm, whose bias is not 0 here, padding has a current of its own.
    student, text = make_student(dtype=torch.float64, **MODEL), _ids(1, 21)
    padded, mask = F.pad(text, (12, 0), value=7), (torch.arange(33) >= 12).long()[None]
    blank = student(padded[:, :12], attention_mask=mask[:, :12]).state
    assert not any(v_BC.any() for layer in blank for v_BC in (layer.time_mix.wkv_BHDD, *layer.membranes_BC))
    plain, shifted = student(text), student(padded, attention_mask=mask)
    torch.testing.assert_close(shifted.logits[:, 12:], plain.logits, rtol=0, atol=1e-9)
    more = _ids(1, 5, seed=2)
    again, expected = (student(more, state=output.state).logits for output in (shifted, plain))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_rate_form_and_steps_form_agree(make_student):
    student, input_ids = make_student(dtype=torch.float64, **MODEL), _ids(2, 40)
    rate_BLV = student(input_ids).logits
    for module in student.modules():
        if isinstance(module, SpikingLinear):
            module.form = "steps"
    # Another order of summation.
    torch.testing.assert_close(student(input_ids).logits, rate_BLV, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_carries_the_membranes(make_student, beams):
    """Its log-probabilities are those of the whole text read at once."""
    student, prompt_BL = make_student(dtype=torch.float64, tie_word_embeddings=False, **MODEL), _ids(1, 9)
    found = student.generate(
        prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=12, num_beams=beams, do_sample=False,
        pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ids = found.sequences
    log_p = student(ids).logits[:, 8:-1].log_softmax(-1)
    if beams == 1:
        assert torch.equal(ids[:, 9:], log_p.argmax(-1)) and len(ids[:, 9:].unique()) > 4
    else:
        total = log_p.gather(2, ids[:, 9:, None]).sum()
        # The mean over the new tokens, kept in float32.
        torch.testing.assert_close(found.sequences_scores.double()[0], total / 12, rtol=0, atol=1e-5)


def test_a_generated_token_moves_the_membranes_to_and_from_memory(make_student):
    keys = {name: {**neuron, "membrane": "token"} for name, neuron in MODEL.items()}
    living, fresh = make_student(**MODEL), make_student(**keys)
    numbers = sum(v_BC.numel() for layer in living(_ids(1, 3)).state for v_BC in layer.membranes_BC)
    assert numbers == 2 * (5 * 32 + 4 * 32) and not any(layer.membranes_BC for layer in fresh(_ids(1, 3)).state)
    more = {kind: moved - student_traffic(fresh)[kind] for kind, moved in student_traffic(living).items()}
    assert {kind: moved for kind, moved in more.items() if moved} == {"state_products": 2 * 4 * numbers}


def test_every_parameter_has_a_finite_gradient_other_than_0(make_student):
    student, input_ids = make_student(**MODEL), _ids(2, 24)
    student(input_ids, labels=input_ids).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name

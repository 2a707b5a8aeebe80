"""The student as a model: streaming and parallel agree to the spike, and it lives as a transformers model should.

Shapes: B batch, L tokens, C channels, V vocabulary.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from asnn_goose.models import GooseConfig, GooseForCausalLM, GooseForSequenceClassification
from asnn_goose.models.spiking import Neuron

V = 50
RICH = {
    "embedding_size": 24,
    "norm": "layer",
    "channel_mix_size": 40,
    "neuron": {"steps": 3, "learn_threshold": "channel", "learn_decay": "layer", "decay": 0.9, "reset": "hard"},
    "hidden_neuron": {"kind": "binary", "scale": "none", "learn_threshold": "fixed", "threshold": 0.2},
    "wkv_chunk": 7,
}
"""A factorised student that uses about every other setting than the default."""


def _ids(*shape: int, seed: int = 0, vocabulary: int = V) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _watch(student: GooseForCausalLM) -> list[list[Tensor]]:
    """For each neuron the spikes [B, L, C] of every call from now on."""
    seen: list[list[Tensor]] = []
    for module in student.modules():
        if isinstance(module, Neuron):
            seen.append([])
            module.register_forward_hook(_append_to(seen[-1]))
    return seen


def _append_to(calls: list[Tensor]):
    return lambda _module, _inputs, output: calls.append(output[0])


@torch.no_grad()
def _streamed(student: GooseForCausalLM, input_ids: Tensor, lengths: list[int]) -> Tensor:
    state, logits = None, []
    for part in input_ids.split(lengths, 1):
        output = student(part, state=state)
        state = output.state
        logits.append(output.logits)
    return torch.cat(logits, 1)


# Streaming


@pytest.mark.parametrize("keys", [{}, RICH], ids=["default", "rich"])
@pytest.mark.parametrize("lengths", [[1] * 512, [1, 7, 100, 3, 31, 33, 97, 240]], ids=["by-token", "in-pieces"])
def test_streaming_gives_the_same_spikes_and_logits_as_one_pass(make_student, keys, lengths):
    student, input_ids = make_student(dtype=torch.float64, **keys), _ids(1, sum(lengths))
    seen = _watch(student)
    with torch.no_grad():
        logits_BLV = student(input_ids).logits
    parallel = [torch.cat(calls, 1) for calls in seen]
    for calls in seen:
        calls.clear()
    torch.testing.assert_close(_streamed(student, input_ids, lengths), logits_BLV, rtol=0, atol=1e-9)
    assert len(parallel) == 12
    for whole_BLC, calls in zip(parallel, seen, strict=True):
        assert whole_BLC.shape[1] == 512 and 0.0 < (whole_BLC != 0).double().mean() < 1.0
        assert torch.equal(torch.cat(calls, 1), whole_BLC)


def test_the_state_does_not_grow_and_a_call_leaves_it_alone(make_student):
    student = make_student()
    with torch.no_grad():
        state = student(_ids(1, 3)).state
        sizes = [tensor.shape for layer in state for tensor in (*layer.time_mix, layer.channel_mix_BC)]
        copies = [tensor.clone() for layer in state for tensor in (*layer.time_mix, layer.channel_mix_BC)]
        later = student(_ids(1, 100, seed=1), state=state).state
        first = student(_ids(1, 5), state=state).logits
        assert torch.equal(student(_ids(1, 5), state=state).logits, first)
    assert [tensor.shape for layer in later for tensor in (*layer.time_mix, layer.channel_mix_BC)] == sizes
    now = [tensor for layer in state for tensor in (*layer.time_mix, layer.channel_mix_BC)]
    assert all(torch.equal(a, b) for a, b in zip(now, copies, strict=True))


def test_rate_form_and_steps_form_agree(make_student):
    student, input_ids = make_student(dtype=torch.float64, **RICH), _ids(2, 40)
    with torch.no_grad():
        rate_BLV = student(input_ids).logits
        for block in student.model.blocks:
            mix = block.time_mix
            for linear in (mix.receptance, mix.key, mix.value, mix.output, *_both(block.channel_mix)):
                linear.form = "steps"
        steps_BLV = student(input_ids).logits
    assert not torch.equal(rate_BLV, steps_BLV)  # another order of summation
    torch.testing.assert_close(steps_BLV, rate_BLV, rtol=0, atol=1e-9)


def _both(channel_mix):
    return channel_mix.key, channel_mix.value


# Batches


def test_nothing_leaks_between_batches_or_within_one(make_student):
    student, input_ids = make_student(dtype=torch.float64), _ids(4, 33)
    with torch.no_grad():
        logits_BLV = student(input_ids).logits
        student(_ids(4, 33, seed=1))
        assert torch.equal(student(input_ids).logits, logits_BLV)
        order = torch.tensor([2, 0, 3, 1])
        # Rows of one product may sum in another order.
        torch.testing.assert_close(student(input_ids[order]).logits, logits_BLV[order], rtol=0, atol=1e-12)
        alone = torch.cat([student(row[None]).logits for row in input_ids])
        torch.testing.assert_close(alone, logits_BLV, rtol=0, atol=1e-12)


def test_the_future_is_not_seen(make_student):
    student, input_ids = make_student(dtype=torch.float64), _ids(1, 40)
    changed = input_ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % V
    with torch.no_grad():
        before, after = student(input_ids).logits, student(changed).logits
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.isclose(before[:, 25:], after[:, 25:]).all(-1).any()


@pytest.mark.parametrize("keys", [{}, RICH], ids=["default", "rich"])
def test_padding_on_the_left_changes_nothing(make_student, keys):
    student, text = make_student(dtype=torch.float64, **keys), _ids(1, 21)
    padded = torch.cat([_ids(1, 12, seed=1), text], 1)
    mask = (torch.arange(33) >= 12).long()[None]
    with torch.no_grad():
        plain, shifted = student(text), student(padded, attention_mask=mask)
        torch.testing.assert_close(shifted.logits[:, 12:], plain.logits, rtol=0, atol=1e-9)
        more = _ids(1, 5, seed=2)
        again = student(more, state=shifted.state, attention_mask=torch.cat([mask, torch.ones(1, 5)], 1)).logits
        torch.testing.assert_close(again, student(more, state=plain.state).logits, rtol=0, atol=1e-9)
        assert not torch.allclose(student(padded).logits[:, 12:], plain.logits)


# Saving


@pytest.mark.parametrize("keys", [{}, RICH, {**RICH, "tie_word_embeddings": False}], ids=["default", "rich", "untied"])
def test_a_saved_student_comes_back_equal(make_student, tmp_path, keys):
    student = make_student(bos_token_id=3, eos_token_id=4, pad_token_id=5, **keys)
    student.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GooseForCausalLM
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
    changed = {"architectures", "_name_or_path"}  # what saving itself adds
    before, after = student.config.to_dict(), loaded.config.to_dict()
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert after["neuron"]["steps"] == (3 if keys else 4)
    assert AutoConfig.from_pretrained(tmp_path).hidden_neuron == student.config.hidden_neuron
    input_ids = _ids(2, 17)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids).logits, student(input_ids).logits)
    tied = keys.get("tie_word_embeddings", True)
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied


def test_thresholds_that_do_not_train_are_saved_too(make_student, tmp_path):
    student = make_student(neuron={"learn_threshold": "fixed", "threshold": 1.5})
    student.model.blocks[1].time_mix.key.neuron.log_threshold.fill_(0.25)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.blocks[1].time_mix.key.neuron.log_threshold.item() == 0.25


@pytest.mark.parametrize("keys", [{}, RICH], ids=["default", "rich"])
def test_a_student_in_bfloat16_predicts_about_the_same(make_student, tmp_path, keys):
    student, input_ids = make_student(**keys), _ids(4, 30)
    student.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected, found = student(input_ids).logits, narrow(input_ids).logits
    assert found.dtype == torch.bfloat16
    # Rounded inputs flip some spikes; independent logits would correlate at 0.
    assert torch.corrcoef(torch.stack([expected.flatten(), found.float().flatten()]))[0, 1] > 0.9


def test_an_unknown_neuron_field_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^treshold = 1.0 \(neuron\): no such key; .* did you mean threshold\?$"):
        GooseConfig(neuron={"treshold": 1.0})
    with pytest.raises(ValueError, match=r"^steps = 0 \(hidden_neuron\): must be a whole number above 0$"):
        GooseConfig(hidden_neuron={"steps": 0})
    with pytest.raises(ValueError, match=r"^norm must be rms or layer, not 'batch'$"):
        GooseConfig(norm="batch")
    config = GooseConfig(hidden_size=32, head_size=16)
    config.hidden_neuron["tau"] = 2.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tau = 2.0 \(hidden_neuron\): no such key"):
        AutoConfig.from_pretrained(tmp_path)


def test_heads_must_fill_the_width():
    with pytest.raises(ValueError, match=r"head_size .24. must divide hidden_size .32."):
        GooseConfig(hidden_size=32, head_size=24)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_size"):
        sizes: dict[str, Any] = {"hidden_size": 32, "head_size": 16, name: 0}
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, not 0"):
            GooseConfig(**sizes)


# Outputs


def test_hidden_states_are_the_residual_stream_before_the_norm(make_student):
    student, input_ids = make_student(**RICH), _ids(2, 9)
    with torch.no_grad():
        output = student(input_ids, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        embedded = student.model.widen(student.model.embedding_norm(student.model.embeddings(input_ids)))
        assert torch.equal(output.hidden_states[0], embedded)
        head = student.lm_head(student.narrow(student.model.norm(output.hidden_states[-1])))
        assert torch.equal(head, output.logits)
        assert student(input_ids).hidden_states is None
        assert torch.equal(student(input_ids, logits_to_keep=2).logits, output.logits[:, -2:])


def test_outputs_are_given_as_transformers_says(make_student):
    student, input_ids = make_student(), _ids(2, 9)
    with torch.no_grad():
        output = student(input_ids, labels=input_ids)
        loss, logits_BLV, state = student(input_ids, labels=input_ids, return_dict=False)
        assert torch.equal(loss, output.loss) and torch.equal(logits_BLV, output.logits) and len(state) == 2
        student.config.return_dict = False
        assert torch.equal(student(input_ids)[0], output.logits)
        assert torch.equal(student(input_ids, return_dict=True).logits, output.logits)
        student.config.return_dict, student.config.output_hidden_states = True, True
        assert len(student(input_ids).hidden_states) == 3
        assert student(input_ids, output_hidden_states=False).hidden_states is None


def test_embeddings_are_refused_and_not_passed_over(make_student):
    student, input_ids = make_student(), _ids(2, 9)
    for model in (student, student.model):
        with pytest.raises(ValueError, match=r"^inputs_embeds are not read: give input_ids instead, .*$"):
            model(input_ids, inputs_embeds=torch.zeros(2, 9, 32))
        with pytest.raises(ValueError, match=r"^inputs_embeds are not read: "):
            model(inputs_embeds=torch.zeros(2, 9, 32))
        with pytest.raises(ValueError, match=r"^past_key_values are not read: what was read before is carried on in"):
            model(input_ids, past_key_values=[1])


def test_a_state_goes_with_its_own_rows_and_without_padding(make_student):
    student, input_ids = make_student(), _ids(2, 9)
    with torch.no_grad():
        state = student(input_ids).state
    with pytest.raises(ValueError, match=r"^the state is of 2 rows and input_ids of 1: "):
        student(input_ids[:1], state=state)
    for padded in (torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1, 1], [1, 0]])):
        with pytest.raises(ValueError, match=r"^with a state no token may be padding: "):
            student(input_ids[:, :2], padded, state)
    # Padding of the tokens that the state has seen is over.
    student(input_ids[:, :2], torch.cat([padded, torch.ones(2, 2)], 1), state)


def test_logits_of_chosen_positions(make_student):
    student, input_ids = make_student(), _ids(2, 9)
    with torch.no_grad():
        everything = student(input_ids).logits
        assert torch.equal(student(input_ids, logits_to_keep=torch.tensor([3, 5])).logits, everything[:, [3, 5]])
    with pytest.raises(ValueError, match=r"^labels need the logits of every position: leave logits_to_keep at 0$"):
        student(input_ids, labels=input_ids, logits_to_keep=1)


@pytest.mark.parametrize("keys", [RICH, {"neuron": {"kind": "ternary"}}], ids=["rich", "ternary"])
def test_a_compiled_student_is_the_same_student(make_student, keys):
    student, input_ids = make_student(**keys), _ids(2, 9)
    found = []
    for model in (student, torch.compile(student, backend="eager")):
        student.zero_grad()
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in student.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def test_what_a_caller_overrides_is_checked_too(make_student, tmp_path):
    make_student().save_pretrained(tmp_path)
    language, classifier = GooseForCausalLM, GooseForSequenceClassification
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (language, {"time_mix": "foo"}, r"^time_mix must be goose or converted, not 'foo'"),
        (language, {"channel_mix": "Gated"}, r"channel_mix relu2 or gated, not 'Gated'"),
        (language, {"norm": "batch"}, r"^norm must be rms or layer, not 'batch'"),
        (classifier, {"exits": [7]}, r"^exits must rise within 1\.\.1"),
        (classifier, {"reading": "foo"}, r"^reading must be"),
    ]
    for kind, keys, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            kind.from_pretrained(tmp_path, **keys)


def test_the_loss_is_the_mean_over_the_labels_that_follow(make_student):
    student, input_ids = make_student(), _ids(2, 9)
    labels = input_ids.clone()
    labels[0, 4:] = -100
    with torch.no_grad():
        output = student(input_ids, labels=labels)
    log_p = output.logits.double().log_softmax(-1)
    pairs = [(b, t) for b in range(2) for t in range(8) if labels[b, t + 1] != -100]
    expected = -sum(log_p[b, t, input_ids[b, t + 1]] for b, t in pairs) / len(pairs)
    assert output.loss.item() == pytest.approx(float(expected), rel=1e-5)  # float32
    assert student.double()(input_ids, labels=labels).loss.dtype == torch.float64


def test_the_loss_of_no_label_is_0_with_a_graph(make_student):
    student, input_ids = make_student(), _ids(2, 9)
    for ids, labels in ((input_ids, torch.full_like(input_ids, -100)), (input_ids[:, :1], input_ids[:, :1])):
        loss = student(ids, labels=labels).loss
        loss.backward()
        assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_no_window_is_no_logit(make_student):
    student = make_student(**RICH)
    output = student(_ids(2, 9)[:0], labels=_ids(2, 9)[:0])
    output.loss.backward()
    assert output.logits.shape == (0, 9, student.config.vocab_size) and output.loss.item() == 0.0


def test_every_parameter_has_a_gradient(make_student):
    student, input_ids = make_student(**RICH), _ids(2, 24)
    student(input_ids, labels=input_ids).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_it_learns_to_copy_the_token_before_the_last(make_student):
    # The next token is the one two places back: a target shifted by one place either way could not be learned.
    torch.manual_seed(0)
    student = make_student(vocab_size=6, neuron={"surrogate": "triangle"}).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=0.01)
    for step in range(60):
        ids = _ids(16, 2, seed=step, vocabulary=6).repeat(1, 5)
        loss = student(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    ids = _ids(64, 2, seed=1000, vocabulary=6).repeat(1, 5)
    with torch.no_grad():
        best = student(ids).logits.argmax(-1)[:, 1:-1]
    assert (best == ids[:, 2:]).double().mean() > 0.95
    differ = ids[:, 1:-1] != ids[:, 2:]
    assert (best == ids[:, 1:-1])[differ].double().mean() < 0.05

"""The student's start from tiny teachers: what is copied, and the regression against numpy.

Shapes: N tokens, E teacher channels, C student channels, V vocabulary.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from asnn_goose.config.schema import StudentConfig
from asnn_goose.errors import UserError
from asnn_goose.models import GooseForCausalLM, Teacher, build_student
from asnn_goose.models.goose import GooseBlock

E, V = 32, 257


def _settings(**keys) -> StudentConfig:
    return StudentConfig(**{"layers": 2, "head_size": 16, **keys})


def _text(seed: int = 0) -> Tensor:
    return torch.randint(V, (20, 50), generator=torch.Generator().manual_seed(seed))


def _gpt2() -> GPT2LMHeadModel:
    """LayerNorm, whose weight and bias are away from their start."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=E, n_layer=2, n_head=2, n_positions=64))
    torch.nn.init.normal_(model.transformer.ln_f.bias)
    torch.nn.init.uniform_(model.transformer.ln_f.weight, 0.5, 1.5)
    torch.nn.init.normal_(model.transformer.wte.weight)
    return model


def _llama(make_teacher, **keys) -> Teacher:
    teacher: Teacher = make_teacher(**keys)
    with torch.no_grad():
        weight_E = teacher.model.get_parameter("model.norm.weight")
        weight_E.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return teacher


def _bias(teacher: Teacher) -> Tensor:
    return torch.zeros(E) if teacher.final_norm_bias_E is None else teacher.final_norm_bias_E


@torch.no_grad()
def _divergence(student: GooseForCausalLM, teacher: Teacher, ids_BL: Tensor) -> float:
    """Mean KL of the student from the teacher, in nats."""
    log_p, log_q = teacher(ids_BL).logits_BLV.log_softmax(-1), student(ids_BL).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


# The regression


def _norm(x: np.ndarray, kind: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def _fit(teacher: Teacher, ids_BL: Tensor, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(map [E + 1, E], e [N, E + 1], y [N, E], teacher's norm weight) in float64, by an augmented least-squares."""
    e = _norm(teacher.embedding_weight_VE.double().numpy()[ids_BL.flatten()], kind)
    e = np.concatenate([e, np.ones((len(e), 1))], 1)
    scale = teacher.final_norm_weight_E.double().numpy()
    y = (teacher.states(ids_BL) - _bias(teacher)).flatten(0, 1).double().numpy() / scale
    # A ridge is N 10^-3 pseudo-observations of 0 per input; the constant has none.
    rows = np.sqrt(1e-3 * len(e)) * np.eye(E + 1)[:E]
    solved, *_ = np.linalg.lstsq(np.concatenate([e, rows]), np.concatenate([y, np.zeros((E, E))]), rcond=None)
    return solved, e, y, scale


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_start_is_the_best_linear_guess_of_the_teachers_last_state(make_teacher, kind):
    teacher = _llama(make_teacher) if kind == "rms" else make_teacher(_gpt2())
    ids_BL = _text()
    student = build_student(_settings(norm=kind), teacher, ids_BL)
    solved, e, y, scale = _fit(teacher, ids_BL, kind)
    guess = e @ solved
    unit = _norm(guess, kind)
    shrink = (unit * y).sum() / (unit**2).sum()
    assert 0.0 < shrink < 1.0
    logits = (unit * shrink * scale + _bias(teacher).double().numpy()) @ teacher.head_weight_VE.double().numpy().T
    with torch.no_grad():
        output = student(ids_BL, output_hidden_states=True)
    # The fit's sums over 1,000 tokens are float32.
    np.testing.assert_allclose(output.hidden_states[0].flatten(0, 1), guess, rtol=0, atol=1e-4)
    np.testing.assert_allclose(output.logits.flatten(0, 1), logits, rtol=0, atol=2e-4 * np.abs(logits).max())
    assert all(torch.equal(state, output.hidden_states[0]) for state in output.hidden_states[1:])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_length_of_the_guess_is_the_least_squares_one(make_teacher, kind):
    teacher = _llama(make_teacher) if kind == "rms" else make_teacher(_gpt2())
    for width in (16, 32, 48):
        student = build_student(_settings(norm=kind, width=width), teacher, _text())
        with torch.no_grad():
            spoken_NE = student.model(_text()).last_hidden_state.flatten(0, 1)
            if kind == "layer":
                spoken_NE = spoken_NE - student.model.norm.get_parameter("bias")
            if student.narrow is not None:
                spoken_NE = student.narrow(spoken_NE)
            spoken_NE = spoken_NE / teacher.final_norm_weight_E
            target_NE = (teacher.states(_text()).flatten(0, 1) - _bias(teacher)) / teacher.final_norm_weight_E
        factor = (spoken_NE * target_NE).sum() / spoken_NE.square().sum()
        assert factor.item() == pytest.approx(1.0, abs=1e-3), width  # float32 sums


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_wider_student_says_what_an_equal_one_does(make_teacher, kind):
    teacher = _llama(make_teacher) if kind == "rms" else make_teacher(_gpt2())
    with torch.no_grad():
        equal = build_student(_settings(norm=kind), teacher, _text())(_text(1)).logits
        wider = build_student(_settings(norm=kind, width=48), teacher, _text())(_text(1)).logits
    if kind == "rms":
        # A rotation leaves the length alone; epsilon is added to a smaller mean square.
        torch.testing.assert_close(wider, equal, rtol=0, atol=1e-3 * equal.abs().max().item())
    else:
        # A layer norm takes the mean out of other channels: 1 of 48 directions.
        assert torch.corrcoef(torch.stack([wider.flatten(), equal.flatten()]))[0, 1] > 0.97


def test_a_narrower_student_keeps_the_guesss_leading_directions(make_teacher):
    teacher = _llama(make_teacher)
    student = build_student(_settings(width=16), teacher, _text())
    solved, e, _, scale = _fit(teacher, _text(), "rms")
    guess = e @ solved
    leading = np.linalg.svd(guess, full_matrices=False)[2][:16]
    with torch.no_grad():
        low = student(_text(), output_hidden_states=True).hidden_states[0].flatten(0, 1).double().numpy()
        assert student.narrow is not None
        back = student.narrow.weight.double().numpy() / scale[:, None]
    # One projector, whatever the signs of its directions.
    np.testing.assert_allclose(low @ back.T, guess @ leading.T @ leading, rtol=0, atol=1e-3)
    np.testing.assert_allclose(back.T @ back, np.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [16, 32, 48])
@pytest.mark.parametrize("tied", [True, False])
def test_the_guess_beats_the_other_starts_on_other_text(make_teacher, width, tied):
    teacher = _llama(make_teacher, tie_word_embeddings=tied)
    with torch.no_grad():
        # So that the current token decides much of the last state of this random teacher.
        teacher.model.get_parameter("model.embed_tokens.weight").mul_(6.0)
    results = {}
    for init in ("regression", "embeddings", "none"):
        torch.manual_seed(0)
        student = build_student(_settings(init=init, width=width), teacher, _text())
        results[init] = _divergence(student, teacher, _text(seed=1))
    assert results.pop("regression") < 0.9 * min(results.values())


# The other starts


def test_embeddings_and_final_norm_are_the_teachers(make_teacher):
    for teacher, kind in ((_llama(make_teacher), "rms"), (make_teacher(_gpt2()), "layer")):
        student = build_student(_settings(init="embeddings", norm=kind), teacher, _text())
        assert torch.equal(student.model.embeddings.weight, teacher.embedding_weight_VE)
        assert student.lm_head.weight is student.model.embeddings.weight
        assert torch.equal(student.model.norm.get_parameter("weight"), teacher.final_norm_weight_E)
        if kind == "layer":
            assert torch.equal(student.model.norm.get_parameter("bias"), _bias(teacher))
        assert student.model.widen is None and student.narrow is None


@pytest.mark.parametrize("init", ["embeddings", "regression"])
def test_a_teacher_with_a_head_of_its_own_gives_the_student_both(make_teacher, tmp_path, init):
    teacher = _llama(make_teacher, tie_word_embeddings=False)
    student = build_student(_settings(init=init), teacher, _text())
    assert torch.equal(student.model.embeddings.weight, teacher.embedding_weight_VE)
    assert torch.equal(student.lm_head.weight, teacher.head_weight_VE)
    assert not torch.equal(student.lm_head.weight, student.model.embeddings.weight)
    student.save_pretrained(tmp_path)
    loaded = GooseForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, teacher.head_weight_VE)


def test_none_takes_nothing_but_the_vocabulary(make_teacher):
    teacher = _llama(make_teacher)
    student = build_student(_settings(init="none", norm="layer"), teacher, _text())
    assert student.model.embeddings.weight.shape == (V, E)
    assert student.lm_head.weight is student.model.embeddings.weight
    similarity = torch.corrcoef(
        torch.stack([student.model.embeddings.weight.flatten(), teacher.embedding_weight_VE.flatten()])
    )
    assert similarity[0, 1].abs() < 0.05  # 8,224 independent numbers: 0.05 is 4.5 standard deviations
    assert torch.equal(student.model.norm.get_parameter("weight"), torch.ones(E))


def test_another_width_puts_a_map_on_each_side(make_teacher):
    student = build_student(_settings(init="embeddings", width=48), _llama(make_teacher), _text())
    assert student.model.widen is not None and student.narrow is not None
    assert (student.config.hidden_size, student.config.embedding_size) == (48, E)
    assert student(_text()).logits.shape == (20, 50, V)


def test_the_configuration_reaches_the_student(make_teacher):
    neuron, hidden = {"steps": 3, "threshold": 1.5}, {"kind": "binary"}
    keys = {"channel_mix_width": 40, "wkv_chunk": 8, "wkv_backend": "reference"}
    settings = _settings(layers=3, neuron=neuron, hidden_neuron=hidden, **keys)
    student = build_student(settings, _llama(make_teacher), _text())
    config = student.config
    assert (config.num_hidden_layers, config.head_size, config.channel_mix_size) == (3, 16, 40)
    assert (config.wkv_chunk, config.wkv_backend) == (8, "reference")
    assert (config.neuron["steps"], config.neuron["threshold"], config.hidden_neuron["kind"]) == (3, 1.5, "binary")
    assert config.eos_token_id == 256
    block = student.model.blocks[2]
    assert isinstance(block, GooseBlock)
    assert block.time_mix.wkv_chunk == 8
    assert block.channel_mix.key.neuron.steps == 3
    assert block.channel_mix.value.neuron.kind == "binary"


def test_one_seed_gives_one_student(make_teacher):
    students = []
    for _ in range(2):
        torch.manual_seed(5)
        students.append(build_student(_settings(width=48), _llama(make_teacher), _text()).state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


# Refusals


def test_a_head_size_that_does_not_divide_the_width_is_refused(make_teacher):
    with pytest.raises(UserError, match=r"student\.head_size 24 does not divide the width 32: choose one that does"):
        build_student(_settings(head_size=24), _llama(make_teacher), _text())
    with pytest.raises(UserError, match="does not divide the width 40"):
        build_student(_settings(width=40), _llama(make_teacher), _text())


def test_another_norm_than_the_teachers_is_refused_where_it_is_taken_over(make_teacher):
    with pytest.raises(UserError, match=r"student\.norm is 'layer' and the teacher's final norm is 'rms': set"):
        build_student(_settings(norm="layer"), _llama(make_teacher), _text())


def test_a_teacher_without_a_plain_norm_can_only_give_nothing(make_teacher):
    shape = {"hidden_size": E, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"head_dim": 16, "num_key_value_heads": 1, "final_logit_softcapping": None}
    teacher = make_teacher(Gemma2ForCausalLM(Gemma2Config(vocab_size=264, **shape, **heads)))
    with pytest.raises(UserError, match=r"plain RMS or layer norm, which student\.init needs"):
        build_student(_settings(), teacher, _text())
    assert build_student(_settings(init="none"), teacher, _text())(_text()).logits.shape == (20, 50, V)

"""generate() against full recomputation without a state, and beam search against all continuations.

Shapes: B batch, L tokens.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asnn_goose.models import GooseForCausalLM

UNTIED = {"dtype": torch.float64, "tie_word_embeddings": False}
"""A random tied head would repeat one token for ever."""


def _ids(*shape: int, seed: int = 0, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _greedy(student: GooseForCausalLM, prompt_BL: Tensor, count: int) -> Tensor:
    """Argmax by full recomputation, without any state."""
    ids = prompt_BL
    for _ in range(count):
        ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompt_BL.shape[1] :]


def _generate(student: GooseForCausalLM, prompt_BL: Tensor, count: int, **keys) -> Tensor:
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = student.generate(prompt_BL, **{"attention_mask": torch.ones_like(prompt_BL), **options, **keys})  # pyright: ignore
    assert isinstance(ids, Tensor)
    return ids[:, prompt_BL.shape[1] :]


def test_generate_is_argmax_by_recomputation(make_student):
    student, prompt_BL = make_student(**UNTIED), _ids(2, 9)
    found = _generate(student, prompt_BL, 20)
    assert len(found.unique()) > 5
    assert torch.equal(found, _greedy(student, prompt_BL, 20))


def test_generate_takes_prompts_of_unequal_length(make_student):
    student, long_L, short_L = make_student(**UNTIED), _ids(9), _ids(4, seed=1)
    prompt_BL = torch.stack([long_L, F.pad(short_L, (5, 0), value=7)])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    found = _generate(student, prompt_BL, 12, attention_mask=mask)
    for row, prompt_L in zip(found, (long_L, short_L), strict=True):
        assert torch.equal(row[None], _greedy(student, prompt_L[None], 12))


def test_generate_calls_the_model_on_one_token_at_a_time(make_student):
    student, lengths = make_student(), []
    student.model.embeddings.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[1]))
    _generate(student, _ids(1, 9), 5)
    assert lengths == [9, 1, 1, 1, 1]


def test_generate_goes_on_from_a_given_state_with_the_whole_prompt(make_student):
    student, past, prompt = make_student(**UNTIED), _ids(1, 11), _ids(1, 6, seed=1)
    with torch.no_grad():
        state = student(past).state
    expected = _greedy(student, torch.cat([past, prompt], 1), 10)
    assert torch.equal(_generate(student, prompt, 10, state=state), expected)


@pytest.mark.parametrize(
    "keys", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=["beam", "draw"]
)
def test_a_given_state_goes_to_all_the_sequences_of_its_row(make_student, keys):
    student, past, prompt = make_student(seed=3, **UNTIED), _ids(2, 11), _ids(2, 6, seed=1)
    with torch.no_grad():
        state = student(past).state
    torch.manual_seed(0)
    found = _generate(student, prompt, 8, state=state, **keys)
    torch.manual_seed(0)
    whole = _generate(student, torch.cat([past, prompt], 1), 8, **keys)
    assert torch.equal(found, whole) and len(found.unique(dim=0)) == len(found)


def test_generate_hands_out_hidden_states(make_student):
    student, prompt = make_student(), _ids(1, 9)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    found = student.generate(prompt, pad_token_id=0, eos_token_id=None, **options)
    with torch.no_grad():
        whole = student(found.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer, states_BLC in enumerate(whole):
        parts = torch.cat([step[layer] for step in found.hidden_states], 1)
        # A pass over one token sums in another order.
        torch.testing.assert_close(parts, states_BLC, rtol=0, atol=1e-5)


@torch.no_grad()
def test_beam_search_carries_each_beams_own_state(make_student):
    small = 4
    student, prompt = make_student(seed=3, vocab_size=small, **UNTIED), _ids(1, 5, vocabulary=small)
    # With as many beams as there are beginnings nothing is pruned: the best of all continuations must come out.
    options = {"num_beams": small**2, "num_return_sequences": small, "length_penalty": 0.0, "do_sample": False}
    found = student.generate(
        prompt, max_new_tokens=3, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_scores=True,
        attention_mask=torch.ones_like(prompt), **options,
    )  # fmt: skip
    tails = torch.tensor(list(itertools.product(range(small), repeat=3)))
    log_p = student(torch.cat([prompt.expand(len(tails), -1), tails], 1)).logits.log_softmax(-1)
    scores, order = log_p[:, 4:-1].gather(2, tails[..., None]).sum((1, 2)).sort(descending=True)
    assert not torch.equal(tails[order[0]][None], _greedy(student, prompt, 3))  # so that beams matter
    assert torch.equal(found.sequences[:, 5:], tails[order[:small]])
    # The scores are kept in float32.
    torch.testing.assert_close(found.sequences_scores.double(), scores[:small], rtol=0, atol=1e-5)

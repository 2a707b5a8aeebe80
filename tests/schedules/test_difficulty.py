"""ROUGE-L by brute force over subsequences, rank fusion in exact fractions, printed numbers of worked examples."""

from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.schedules import rouge_l, rrf_difficulty, rrf_scores

# The printed scores have eight decimals.
PRINTED = 5e-9
# Few distinct values, so that ties are common; many ROUGE values of a real student are exactly 0.
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.0, 0.25, 0.5])), min_size=1, max_size=12)
WORDS = {word: i for i, word in enumerate(("the", "cat", "sat", "on", "mat"))}


def ids(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def subsequences(tokens: list[int]) -> set[tuple[int, ...]]:
    return {rest for length in range(len(tokens) + 1) for rest in combinations(tokens, length)}


def average_rank(values: list[Fraction], i: int) -> Fraction:
    """1 + how many are lower + half of how many others are equal."""
    lower = sum(value < values[i] for value in values)
    return Fraction(1 + 2 * lower + sum(value == values[i] for value in values), 2)


def test_rouge_of_a_sentence():
    """LCS 4 of 6 and 4 tokens: P = 1, R = 2/3, F1 = 0.8."""
    assert rouge_l([ids("the cat sat on the mat")], [ids("the cat on mat")]) == pytest.approx([0.8], rel=1e-15)


def test_rouge_keeps_the_order_of_the_pairs():
    assert rouge_l([[1, 2], [1, 2], [1, 2]], [[1, 2], [3], [2]]) == pytest.approx([1.0, 0.0, 2 / 3])
    assert rouge_l([], []) == []


@pytest.mark.parametrize(("reference", "hypothesis"), [([], [1]), ([1], []), ([], [])])
def test_rouge_of_nothing_is_0(reference: list[int], hypothesis: list[int]):
    assert rouge_l([reference], [hypothesis]) == [0.0]


def test_rouge_takes_ids_as_they_are():
    """Ids of 0 and of any size are tokens like others, and 12 does not match 1 followed by 2."""
    assert rouge_l([[0, 49_151]], [[0, 49_151]]) == [1.0]
    assert rouge_l([[12]], [[1, 2]]) == [0.0]


@given(
    reference=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    hypothesis=st.lists(st.integers(0, 3), min_size=1, max_size=7),
)
def test_rouge_by_brute_force(reference: list[int], hypothesis: list[int]):
    longest = max(map(len, subsequences(reference) & subsequences(hypothesis)))
    # 2PR / (P + R) = 2 LCS / (m + n).
    assert rouge_l([reference], [hypothesis]) == pytest.approx([2 * longest / (len(reference) + len(hypothesis))])


def test_a_plain_order():
    loss, rouge = [1, 2, 3, 4], [0.9, 0.1, 0.6, 0.3]
    printed = [0.03278689, 0.03175403, 0.03200205, 0.03149802]
    assert rrf_scores(loss, rouge) == pytest.approx(printed, abs=PRINTED)
    assert rrf_difficulty(loss, rouge) == [0, 2, 1, 3]


def test_rank_1_is_the_easiest():
    """Loss ranks 1, 2, 3, 4 and ROUGE ranks 1, 4, 3, 2, easy first: where the orientation decides.

    Ranked hard first, item 1 would be harder than item 2.
    """
    loss, rouge = [1, 2, 3, 4], [0.9, 0.1, 0.3, 0.6]
    printed = [0.03278689, 0.03175403, 0.03174603, 0.03175403]
    assert rrf_scores(loss, rouge) == pytest.approx(printed, abs=PRINTED)
    # 1 and 3 have one score, and 1 the lower loss.
    assert rrf_difficulty(loss, rouge) == [0, 1, 3, 2]
    hard_first = rrf_scores([-value for value in loss], [-value for value in rouge])
    assert hard_first == pytest.approx([0.03125, 0.03226646, 0.03225806, 0.03226646], abs=PRINTED)
    assert hard_first[1] > hard_first[2]


def test_equal_values_share_the_mean_of_their_ranks():
    """ROUGE 0 three times: ranks 3, and not 2, 3, 4 in the order of the list."""
    scores = rrf_scores([1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.0, 0.0])
    assert scores == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 63, 1 / 64 + 1 / 63], rel=1e-15)
    assert rrf_difficulty([5.0, 5.0, 5.0], [0.1, 0.1, 0.1]) == [0, 1, 2]


@given(pairs=PAIRS, k=st.sampled_from([0, 1, 60]))
def test_scores_by_exact_fractions(pairs: list[tuple[int, float]], k: int):
    loss = [Fraction(pair[0]) for pair in pairs]
    hardness = [-Fraction(pair[1]) for pair in pairs]
    expected = [1 / (k + average_rank(loss, i)) + 1 / (k + average_rank(hardness, i)) for i in range(len(pairs))]
    losses, rouges = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    # Two quotients and a sum: three roundings of 1.1e-16 each.
    assert rrf_scores(losses, rouges, k) == pytest.approx([float(score) for score in expected], rel=4e-16, abs=0.0)
    order = rrf_difficulty(losses, rouges, k)
    assert sorted(order) == list(range(len(pairs)))
    ordered = [float(expected[i]) for i in order]
    assert all(a >= b or a == pytest.approx(b, rel=4e-16, abs=0.0) for a, b in pairwise(ordered))


@given(pairs=PAIRS, data=st.data())
def test_permuting_the_input_permutes_the_output(pairs: list[tuple[int, float]], data):
    moved = data.draw(st.permutations(pairs))
    before = rrf_difficulty([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    after = rrf_difficulty([pair[0] for pair in moved], [pair[1] for pair in moved])
    assert [pairs[i] for i in before] == [moved[i] for i in after]


def test_arrays_and_tensors_are_taken():
    loss, rouge = [2.0, 1.0, 3.0], [0.5, 0.25, 0.0]
    expected = rrf_difficulty(loss, rouge)
    assert rrf_difficulty(np.array(loss), np.array(rouge)) == expected
    assert rrf_difficulty(torch.tensor(loss, requires_grad=True), torch.tensor(rouge).bfloat16()) == expected
    assert rrf_difficulty([], []) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rrf_difficulty([1.0, 2.0], [0.5]), "loss and rouge must have one entry per example each, not 2 and 1"),
        (lambda: rouge_l([[1], [2]], [[1]]), r"references and hypotheses .* not 2 and 1"),
        (lambda: rrf_scores([1.0, float("nan")], [0.5, 0.5]), r"loss\[1\] is NaN"),
        (lambda: rrf_scores([[1.0]], [[0.5]]), r"loss must have one value per example, not the shape \(1, 1\)"),
        (lambda: rrf_scores([1.0], [0.5], k=-1.0), r"k must be above -1.*-1\.0"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()

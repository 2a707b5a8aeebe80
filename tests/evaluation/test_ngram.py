"""Unigram and Kneser-Ney bigram against hand-computed values and a brute-force dictionary implementation."""

import itertools
import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asnn_goose.evaluation.ngram import Bigram, Unigram, fit_bigram, fit_unigram, perplexity

# Both sides are float64 sums of a few terms below 1; their order differs.
CLOSE = 1e-12


def brute_discount(counts: list[int]) -> float:
    once, twice = counts.count(1), counts.count(2)
    return once / (once + 2 * twice) if once else 0.5


def brute_discounted(counts: dict[int, int], vocabulary: int) -> list[float]:
    discount, total = brute_discount(list(counts.values())), sum(counts.values())
    kept = [max(counts.get(w, 0) - discount, 0.0) / total for w in range(vocabulary)]
    return [p + discount * len(counts) / total / vocabulary for p in kept]


def brute_bigram(pieces: list[list[int]], vocabulary: int) -> list[list[float]]:
    """P[v][w] by the formula, one count at a time."""
    counts: Counter[tuple[int, int]] = Counter()
    for piece in pieces:
        counts.update(itertools.pairwise(piece))
    successors, predecessors, context = defaultdict(set), defaultdict(set), Counter()
    for (v, w), count in counts.items():
        successors[v].add(w)
        predecessors[w].add(v)
        context[v] += count
    lower = brute_discounted({w: len(before) for w, before in predecessors.items()}, vocabulary)
    discount = brute_discount(list(counts.values()))
    table = []
    for v in range(vocabulary):
        if context[v] == 0:
            table.append(lower)
            continue
        left = discount * len(successors[v]) / context[v]
        table.append([max(counts[v, w] - discount, 0) / context[v] + left * lower[w] for w in range(vocabulary)])
    return table


def table_of(model: Bigram | Unigram, vocabulary: int) -> np.ndarray:
    previous, current = np.divmod(np.arange(vocabulary**2), vocabulary)
    return np.exp(model.log_probability(previous, current)).reshape(vocabulary, vocabulary)


def test_bigram_by_hand():
    """0 1 0 2 0 1 out of four tokens: one pair twice, three once, so D = 3/5; continuation counts 2, 1, 1: D = 1/2."""
    lower = [0.46875, 0.21875, 0.21875, 0.09375]
    expected = [
        [0.4 * lower[0], 1.4 / 3 + 0.4 * lower[1], 0.4 / 3 + 0.4 * lower[2], 0.4 * lower[3]],
        [0.4 + 0.6 * lower[0], 0.6 * lower[1], 0.6 * lower[2], 0.6 * lower[3]],
        [0.4 + 0.6 * lower[0], 0.6 * lower[1], 0.6 * lower[2], 0.6 * lower[3]],
        lower,
    ]
    np.testing.assert_allclose(table_of(fit_bigram(np.array([0, 1, 0, 2, 0, 1]), 4), 4), expected, rtol=CLOSE)


def test_unigram_by_hand():
    """Counts 3, 2, 1, 0: D = 1/3, and a twenty-fourth of the mass goes to each token."""
    expected = [8 / 18 + 1 / 24, 5 / 18 + 1 / 24, 2 / 18 + 1 / 24, 1 / 24]
    model = fit_unigram(np.array([0, 1, 0, 2, 0, 1]), 4)
    np.testing.assert_allclose(model.probability_V, expected, rtol=CLOSE)


pieces_and_vocabulary = st.integers(2, 6).flatmap(
    lambda vocabulary: st.tuples(
        st.lists(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=25), min_size=1, max_size=4),
        st.just(vocabulary),
    )
)


@settings(max_examples=150)
@given(pieces_and_vocabulary)
def test_bigram_equals_brute_force_and_sums_to_one(drawn: tuple[list[list[int]], int]):
    pieces, vocabulary = drawn
    tokens = np.concatenate([np.array(piece) for piece in pieces])
    starts = np.cumsum([0, *map(len, pieces)])
    if all(len(piece) == 1 for piece in pieces):
        with pytest.raises(ValueError, match="pair"):
            fit_bigram(tokens, vocabulary, starts)
        return
    table = table_of(fit_bigram(tokens, vocabulary, starts), vocabulary)
    np.testing.assert_allclose(table, brute_bigram(pieces, vocabulary), rtol=CLOSE)
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=CLOSE)
    assert (table > 0).all()


@settings(max_examples=60)
@given(pieces_and_vocabulary)
def test_unigram_equals_brute_force_and_sums_to_one(drawn: tuple[list[list[int]], int]):
    pieces, vocabulary = drawn
    tokens = np.concatenate([np.array(piece) for piece in pieces])
    probability = fit_unigram(tokens, vocabulary).probability_V
    np.testing.assert_allclose(probability, brute_discounted(Counter(tokens.tolist()), vocabulary), rtol=CLOSE)
    assert math.isclose(probability.sum(), 1.0, rel_tol=CLOSE)
    assert (probability > 0).all()


def test_no_pair_reaches_across_a_start():
    tokens = np.array([0, 1, 2, 0, 1])
    apart = fit_bigram(tokens, 3, starts=np.array([0, 2]))
    assert 1 * 3 + 2 not in apart.pairs_P
    assert 1 * 3 + 2 in fit_bigram(tokens, 3).pairs_P


def test_perplexity_counts_the_students_positions():
    tokens = np.random.default_rng(0).integers(0, 5, 300)
    model = fit_bigram(tokens, 5)
    ids = np.array([[0, 1, 2, 3], [4, 3, 0, 0]])
    mask = np.array([[True, True, True, True], [True, True, False, False]])
    table = table_of(model, 5)
    predicted = [(0, 1), (1, 2), (2, 3), (4, 3)]
    expected = math.exp(-sum(math.log(table[v, w]) for v, w in predicted) / len(predicted))
    assert math.isclose(perplexity(model, [(ids, mask)]), expected, rel_tol=CLOSE)
    split = [(ids[:1], mask[:1]), (ids[1:], mask[1:])]
    assert math.isclose(perplexity(model, split), expected, rel_tol=CLOSE)


def test_perplexity_of_a_uniform_unigram_is_the_vocabulary():
    model = Unigram(np.full(7, 1 / 7))
    batch = (np.arange(12).reshape(3, 4) % 7, np.ones((3, 4), dtype=bool))
    assert math.isclose(perplexity(model, [batch]), 7.0, rel_tol=CLOSE)


def test_nothing_to_count_is_refused():
    with pytest.raises(ValueError, match="token"):
        fit_unigram(np.array([], dtype=np.int64), 4)
    with pytest.raises(ValueError, match="pair"):
        fit_bigram(np.array([1]), 4)
    for fit in (fit_unigram, fit_bigram):
        with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.4, not 1\.\.9"):
            fit(np.array([1, 9]), 5)
    with pytest.raises(ValueError, match="predict"):
        perplexity(Unigram(np.ones(1)), [(np.zeros((2, 1), dtype=np.int64), np.ones((2, 1), dtype=bool))])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_pairs_of_a_large_vocabulary_do_not_overflow_the_dtype_of_a_shard(dtype: type[np.integer]):
    tokens = np.array([49_151, 49_150, 49_151, 49_150, 0], dtype=dtype)
    model = fit_bigram(tokens, 49_152)
    # Pairs: one twice, two once, so D = 1/2; three distinct tokens follow, once each: continuation D = 1.
    expected = (2 - 0.5) / 2 + 0.5 * 1 / 2 / 49_152
    log_p = model.log_probability(tokens[:1], tokens[1:2])
    assert math.isclose(math.exp(log_p[0]), expected, rel_tol=CLOSE)


def test_a_corpus_of_millions_of_tokens_fits_in_seconds():
    # Zipf-like, as text is; the fit itself takes about 0.3 s on one core, and 5 s leaves room for a busy machine.
    tokens = (np.random.default_rng(0).pareto(0.8, 2_750_000) * 20).astype(np.int64) % 49_152
    began = time.process_time()
    model = fit_bigram(tokens.astype(np.uint16), 49_152)
    assert time.process_time() - began < 5.0
    assert np.isfinite(model.log_probability(tokens[:1000], tokens[1:1001])).all()

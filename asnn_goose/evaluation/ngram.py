"""Unigram and bigram language models over token ids: the baselines that a student has to beat.

Counts, probabilities and perplexities are float64; log-probabilities are natural. Every token of the vocabulary has a
probability above 0 in every context, seen or not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unigram:
    """P(w) = max(c(w) - D, 0) / N + D * S / (N * V), for N counts over S distinct tokens out of a vocabulary of V."""

    probability_V: Floats

    def log_probability(self, previous: Ints, current: Ints) -> Floats:
        """ln P(current), in nats, in the shape of `current`; `previous` does not matter."""
        return np.log(self.probability_V[current])


@dataclass(frozen=True)
class Bigram:
    """Interpolated Kneser-Ney with one discount.

    P(w | v) = max(c(v, w) - D, 0) / c(v) + D * S(v) / c(v) * P_c(w)

    c(v) counts v as the first token of a pair, S(v) its distinct successors. The lower order P_c is the same
    discounted form over continuation counts, that is over the number of distinct tokens seen in front of w, and ends
    in the uniform distribution. In a context never seen, P(w | v) = P_c(w).

    Kneser and Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; the interpolated form is that
    of Chen and Goodman, "An empirical study of smoothing techniques for language modeling", Computer Speech and
    Language, 1999.
    """

    pairs_P: Ints
    """Distinct pairs as v * V + w, ascending."""
    discounted_P: Floats
    """(c(v, w) - D) / c(v) of each pair."""
    backoff_V: Floats
    """D * S(v) / c(v), the mass that a context leaves to the lower order; 1 for a context never seen."""
    continuation: Unigram

    def log_probability(self, previous: Ints, current: Ints) -> Floats:
        """ln P(current | previous), in nats; both of one shape, which the result has too."""
        pair = previous.astype(np.int64) * len(self.backoff_V) + current
        place = np.searchsorted(self.pairs_P, pair)
        place[place == len(self.pairs_P)] = 0
        seen = np.where(self.pairs_P[place] == pair, self.discounted_P[place], 0.0)
        return np.log(seen + self.backoff_V[previous] * self.continuation.probability_V[current])


def fit_unigram(tokens: Ints, vocabulary: int) -> Unigram:
    """Unigram of a stream of token ids.

    Args:
        tokens: ids in [0, vocabulary), at least one.
        vocabulary: V, the number of tokens that share the probability.

    Raises:
        ValueError: no token, or an id outside the vocabulary.
    """
    if len(tokens) == 0:
        raise ValueError("a unigram needs at least one token")
    _check_ids(tokens, vocabulary)
    return _discounted(np.bincount(tokens, minlength=vocabulary))


def fit_bigram(tokens: Ints, vocabulary: int, starts: Ints | None = None) -> Bigram:
    """Bigram of a stream of token ids, in O(N log N) time and memory for N tokens.

    Args:
        tokens: ids in [0, vocabulary). Text seen in several epochs is given once: the discount is read off the number
            of pairs that occur once, and repetition makes those vanish.
        vocabulary: V.
        starts: positions at which a document or window begins; no pair reaches across. None: one piece.

    Raises:
        ValueError: no pair of neighbours, or an id outside the vocabulary.
    """
    inside = np.ones(max(len(tokens) - 1, 0), dtype=bool)
    if starts is not None:
        edges = np.asarray(starts)
        inside[edges[(edges > 0) & (edges < len(tokens))] - 1] = False
    if not inside.any():
        raise ValueError("a bigram needs at least one pair of neighbouring tokens")
    _check_ids(tokens, vocabulary)
    pairs_N = tokens[:-1][inside].astype(np.int64) * vocabulary + tokens[1:][inside]
    pairs_P, counts_P = np.unique(pairs_N, return_counts=True)
    first_P, second_P = np.divmod(pairs_P, vocabulary)
    context_V = np.bincount(first_P, weights=counts_P, minlength=vocabulary)
    successors_V = np.bincount(first_P, minlength=vocabulary)
    discount = _discount(counts_P)
    return Bigram(
        pairs_P=pairs_P,
        discounted_P=(counts_P - discount) / context_V[first_P],
        backoff_V=np.divide(discount * successors_V, context_V, out=np.ones(vocabulary), where=context_V > 0),
        continuation=_discounted(np.bincount(second_P, minlength=vocabulary)),
    )


def _check_ids(tokens: Ints, vocabulary: int) -> None:
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"tokens must lie in 0..{vocabulary - 1}, not {tokens.min()}..{tokens.max()}")


def perplexity(model: Unigram | Bigram, windows: Iterable[tuple[Ints, NDArray[np.bool_]]]) -> float:
    """exp of the mean negative log-probability over all predicted tokens of all batches.

    Args:
        windows: batches of (input_ids [B, L], mask [B, L], True on real tokens). As for the student, position i
            predicts token i + 1 of its window, where the mask of that token is True.

    Raises:
        ValueError: no token is predicted.
    """
    total, count = 0.0, 0
    for input_ids, mask in windows:
        log_p = model.log_probability(input_ids[:, :-1], input_ids[:, 1:])
        total += float(log_p[mask[:, 1:]].sum())
        count += int(mask[:, 1:].sum())
    if count == 0:
        raise ValueError("there is no token to predict")
    return float(np.exp(-total / count))


def _discounted(counts_V: Ints) -> Unigram:
    discount, total = _discount(counts_V), counts_V.sum()
    reserved = discount * np.count_nonzero(counts_V) / total
    return Unigram(np.maximum(counts_V - discount, 0.0) / total + reserved / len(counts_V))


def _discount(counts: Ints) -> float:
    """D = n1 / (n1 + 2 n2), with n1 and n2 the number of events seen once and twice (Kneser and Ney, 1995).

    Without an event seen once the formula gives 0 or nothing, and unseen events would get probability 0; D is 1/2 then.
    """
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once else 0.5

"""Near-duplicates, against comparing every pair of sets of words."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asnn_goose.data.near_duplicates import keep_first_of_near_duplicates


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower()) or [text]
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def _every_pair(texts: list[str], threshold: float) -> list[int]:
    kept: list[int] = []
    for i, text in enumerate(texts):
        own = _shingles(text)
        others = (_shingles(texts[j]) for j in kept)
        if all(len(own & other) / len(own | other) < threshold for other in others):
            kept.append(i)
    return kept


# Two words and short texts: shingles are shared all the time, at every frequency.
_texts = st.lists(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=14).map(" ".join), max_size=12)


@settings(max_examples=300)
@given(_texts, st.sampled_from([0.05, 0.2, 1 / 3, 0.5, 2 / 3, 0.9, 1.0]))
def test_agrees_with_every_pair(texts, threshold):
    assert keep_first_of_near_duplicates(texts, threshold) == _every_pair(texts, threshold)


def test_overlap_of_exactly_the_threshold_is_a_duplicate():
    one = " ".join(f"w{i}" for i in range(16))  # 12 shingles
    other = " ".join(f"w{i}" for i in range(4, 20))  # 8 of them, 4 new: overlap 8 / 16
    assert keep_first_of_near_duplicates([one, other], 0.5) == [0]
    assert keep_first_of_near_duplicates([one, other], 0.51) == [0, 1]


def test_a_dropped_document_drops_no_other():
    chain = [" ".join(f"w{i}" for i in range(start, start + 16)) for start in (0, 4, 8)]
    assert keep_first_of_near_duplicates(chain, 0.5) == [0, 2]


def test_case_and_punctuation_do_not_count_and_texts_without_words_stand_for_themselves():
    assert keep_first_of_near_duplicates(["The cat sat!", "the CAT, sat.", "...", "...", "?"], 1.0) == [0, 2, 4]


@pytest.mark.parametrize("texts", [[], ["one"]])
def test_nothing_to_compare(texts):
    assert keep_first_of_near_duplicates(texts, 0.5) == list(range(len(texts)))

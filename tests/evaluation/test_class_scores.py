"""Accuracy, macro-F1 and their intervals against loops over texts, closed forms, and drawing texts one by one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.evaluation.classification import accuracy, confusion, macro_f1, score


def _by_hand(labels: list[int], predicted: list[int], classes: int) -> tuple[float, float, list[list[int]]]:
    """Accuracy, macro-F1 and matrix from their definitions: precision and recall of each class, text by text."""
    pairs = list(zip(labels, predicted, strict=True))
    f1 = []
    for c in range(classes):
        right, named, there = pairs.count((c, c)), predicted.count(c), labels.count(c)
        if named or there:
            precision, recall = right / named if named else 0.0, right / there if there else 0.0
            f1.append(2 * precision * recall / (precision + recall) if right else 0.0)
    matrix = [[pairs.count((row, column)) for column in range(classes)] for row in range(classes)]
    return sum(a == b for a, b in pairs) / len(pairs), sum(f1) / len(f1), matrix


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_measures_are_those_of_their_definitions(pairs):
    labels, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    found = score(np.array(labels), np.array(predicted), 4)
    expected = _by_hand(labels, predicted, 4)
    assert found.accuracy == pytest.approx(expected[0], rel=1e-12)
    assert found.macro_f1 == pytest.approx(expected[1], rel=1e-12)
    assert found.confusion_CC.tolist() == expected[2]


def test_a_small_example():
    # Class 0: precision 2/3, recall 2/2, F1 4/5; class 1: 1/2, 1/3, F1 2/5; class 2 never named: 0; class 3 nowhere.
    labels, predicted = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 0, 1, 0, 2, 1])
    found = score(labels, predicted, 4)
    assert found.texts == 6
    assert found.accuracy == pytest.approx(3 / 6)
    assert found.macro_f1 == pytest.approx((4 / 5 + 2 / 5 + 0) / 3)
    assert found.confusion_CC.tolist() == [[2, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_many_matrices_at_once():
    draw = np.random.default_rng(0)
    stack = draw.integers(0, 5, (7, 3, 3)) + np.eye(3, dtype=int)
    assert accuracy(stack) == pytest.approx([float(accuracy(matrix)) for matrix in stack])
    assert macro_f1(stack) == pytest.approx([float(macro_f1(matrix)) for matrix in stack])


def test_the_interval_of_the_accuracy_is_a_binomials():
    labels = np.zeros(2000, dtype=int)
    predicted = np.where(np.arange(2000) < 1800, 0, 1)
    low, high = score(labels, predicted, 2).accuracy_interval()
    half = 1.96 * math.sqrt(0.9 * 0.1 / 2000)
    # A quantile of 2,000 draws is off by about a twentieth of the half width.
    assert low == pytest.approx(0.9 - half, abs=0.1 * half)
    assert high == pytest.approx(0.9 + half, abs=0.1 * half)


def test_intervals_are_those_of_texts_drawn_one_by_one():
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, 300)
    predicted = np.where(draw.random(300) < 0.7, labels, draw.integers(0, 3, 300))
    found = score(labels, predicted, 3)
    rows = draw.integers(0, 300, (2000, 300))
    means = {"accuracy": [], "macro_f1": []}
    for row in rows:
        again = score(labels[row], predicted[row], 3)
        means["accuracy"].append(again.accuracy)
        means["macro_f1"].append(again.macro_f1)
    for name, interval in (("accuracy", found.accuracy_interval()), ("macro_f1", found.macro_f1_interval())):
        expected = np.quantile(means[name], [0.025, 0.975])
        # Both ends are quantiles of 2,000 draws, each off by about 0.0015 for a spread of 0.025.
        assert interval == pytest.approx(tuple(expected), abs=0.006)
        assert interval[0] < getattr(found, name) < interval[1]


def test_intervals_follow_the_seed_alone():
    found = score(np.arange(50) % 3, np.arange(50) % 4 % 3, 3)
    assert found.macro_f1_interval(seed=3) == found.macro_f1_interval(seed=3)
    assert found.macro_f1_interval(seed=3) != found.macro_f1_interval(seed=4)


def test_a_perfect_score_has_no_spread():
    found = score(np.arange(9) % 3, np.arange(9) % 3, 3)
    assert found.accuracy_interval() == (1.0, 1.0)
    assert found.macro_f1_interval() == (1.0, 1.0)  # a class that a resample misses is left out


@pytest.mark.parametrize(
    ("labels", "predicted", "sentence"),
    [([], [], "0 labels and 0 predictions"), ([0], [0, 1], "1 labels and 2"), ([0, 3], [0, 1], r"0\.\.2, not 0\.\.3")],
)
def test_what_cannot_be_scored_is_refused(labels, predicted, sentence):
    with pytest.raises(ValueError, match=sentence):
        confusion(np.array(labels, dtype=int), np.array(predicted, dtype=int), 3)

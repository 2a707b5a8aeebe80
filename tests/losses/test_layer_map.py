"""Layer maps: published tables, and what holds for every number of layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.losses import layer_map


@pytest.mark.parametrize(
    ("teacher", "student", "strategy", "expected"),
    [
        (12, 4, "tinybert", [3, 6, 9, 12]),
        (12, 4, "uniform", [3, 6, 9, 12]),
        (12, 5, "uniform", [2, 5, 7, 10, 12]),
        (3, 2, "uniform", [2, 3]),
        (30, 4, "uniform", [8, 15, 23, 30]),
        (
            24, 30, "uniform",
            [1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12,
             13, 14, 14, 15, 16, 17, 18, 18, 19, 20, 21, 22, 22, 23, 24],
        ),
        (12, 6, "pkd_skip", [2, 4, 6, 8, 10]),
        (12, 6, "pkd_last", [7, 8, 9, 10, 11]),
        (6, 6, "pkd_last", [1, 2, 3, 4, 5]),
        (12, 6, "uniform", [2, 4, 6, 8, 10, 12]),
        (30, 6, "last", [30]),
        (1, 1, "pkd_skip", []),
    ],
)  # fmt: skip
def test_tables(teacher: int, student: int, strategy: str, expected: list[int]):
    assert layer_map(teacher, student, strategy) == expected


@given(teacher=st.integers(1, 60), student=st.integers(1, 60))
def test_uniform_ends_at_the_last_layer_and_never_falls(teacher: int, student: int):
    found = layer_map(teacher, student)
    assert len(found) == student and found[-1] == teacher
    assert found == sorted(found) and found[0] >= 1
    if student <= teacher:
        assert len(set(found)) == student


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 5, "tinybert"), "12 teacher layers to be divisible by 5: use uniform"),
        ((12, 5, "pkd_skip"), "12 teacher layers to be divisible by 5: use uniform"),
        ((4, 6, "pkd_last"), r"at least as many teacher layers \(4\) as student layers \(6\)"),
        ((0, 6), "at least one layer on both sides"),
        ((12, 6, "first"), "must be one of uniform, tinybert, pkd_skip, pkd_last, last, not 'first'"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        layer_map(*arguments)

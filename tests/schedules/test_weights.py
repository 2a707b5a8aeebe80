"""warmup_cosine against its closed form and the properties that a schedule must have."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.schedules import warmup_cosine


def test_rise_of_a_run_of_1557_updates():
    """155 of 1,557 updates warm up (TECHNIQUES 13.3); the first one already moves the weights."""
    total, warmup = 1557, 155 / 1557
    assert warmup_cosine(0, total, warmup, 0.1) == pytest.approx(1 / 155)
    for step in (0, 1, 77, 153):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / total)) / 2
        assert warmup_cosine(step, total, warmup, 0.1) == pytest.approx((step + 1) / 155 * cosine)
    # From the 155th update on the cosine alone is left.
    assert warmup_cosine(154, total, warmup, 0.1) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 154 / total)))


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (25, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4), (50, 0.55), (100, 0.1)]
)
def test_cosine_without_warm_up(step: int, factor: float):
    assert warmup_cosine(step, 100, 0.0, 0.1) == pytest.approx(factor)


def test_after_the_end_it_stays_at_the_end():
    assert [warmup_cosine(step, 100, 0.05, 0.25) for step in (100, 101, 5000)] == [0.25] * 3


def test_a_run_of_one_update_takes_it_whole():
    assert warmup_cosine(0, 1, 0.05, 0.1) == 1.0
    assert warmup_cosine(0, 1, 1.0, 0.1) == 1.0


def test_warm_up_over_the_whole_run_still_rises_from_the_first_update():
    factors = [warmup_cosine(step, 10, 1.0, 1.0) for step in range(10)]
    assert factors == pytest.approx([k / 10 for k in range(1, 11)])


@given(total=st.integers(1, 5000), warmup=st.floats(0, 1), end=st.floats(0, 1), data=st.data())
def test_every_update_of_a_run_has_a_rate_within_the_peak(total: int, warmup: float, end: float, data):
    step = data.draw(st.integers(0, total - 1))
    factor = warmup_cosine(step, total, warmup, end)
    assert 0.0 < factor <= 1.0
    if step + 1 >= warmup * total:
        # After the rise it only falls, down to end.
        assert end - 1e-12 <= warmup_cosine(step + 1, total, warmup, end) <= factor + 1e-12

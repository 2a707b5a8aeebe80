"""warmup_cosine and ramp against their closed forms and the properties that a schedule must have."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.schedules import ramp, warmup_cosine


def test_rise_of_a_run_of_1557_updates():
    """155 of 1,557 updates warm up; the first one already moves the weights."""
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


def test_a_weight_that_warms_up():
    """0.1 to 0.7 over the first fifth of a run."""
    shares = (0.0, 0.04, 0.05, 0.1, 0.15, 0.2, 0.9)
    found = [ramp(x / 0.2, 0.1, 0.7) for x in shares]
    assert found == pytest.approx([0.1, 0.22, 0.25, 0.4, 0.55, 0.7, 0.7], abs=1e-12)


def test_a_phase_in_the_middle_of_a_run():
    """0 to 0.1 between 30 % and 60 % of 24,914 steps: 0.067242 at step 12,500."""
    assert ramp((12_500 / 24_914 - 0.3) / 0.3, 0.0, 0.1) == pytest.approx(0.067242, abs=1e-6)


@given(x=st.floats(-2, 3), start=st.floats(0, 5), end=st.floats(0, 5), shape=st.sampled_from(["linear", "cosine"]))
def test_a_ramp_stays_between_its_ends_and_is_symmetric(x: float, start: float, end: float, shape):
    value = ramp(x, start, end, shape)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12
    assert value + ramp(1 - x, start, end, shape) == pytest.approx(start + end, abs=1e-9)
    assert (ramp(-1, start, end, shape), ramp(2, start, end, shape)) == pytest.approx((start, end))


@given(start=st.floats(0, 5), end=st.floats(0, 5), shape=st.sampled_from(["linear", "cosine"]))
def test_a_ramp_ends_at_its_end_to_the_last_digit(start: float, end: float, shape):
    assert ramp(1.0, start, end, shape) == ramp(7.0, start, end, shape) == end
    assert ramp(1.0, 0.3, 0.9, shape) == 0.9 and ramp(0.0, start, end, shape) == start


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warmup_cosine(0, 0, 0.1, 0.1), "total must be at least 1 optimiser step, not 0"),
        (lambda: ramp(0.25, 0.0, 1.0, "sqrt"), "shape must be linear or cosine, not 'sqrt'"),  # pyright: ignore
        (lambda: ramp(math.nan, 0.0, 1.0), "x must be a share of the ramp, not nan"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()

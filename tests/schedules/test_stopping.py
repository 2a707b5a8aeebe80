"""Early stopping on a printed series, against a second form of its rule, and resumed at every point."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.schedules import EarlyStopping, earliest_stop

SERIES = [3.0, 2.5, 2.4, 2.41, 2.405, 2.399, 2.42, 2.43, 2.44]
# In steps of 1/8, which floats hold exactly, so that an improvement of just min_delta is one in every form.
VALUES = st.lists(st.integers(0, 40).map(lambda i: i / 8), min_size=1, max_size=30)
DELTAS = st.sampled_from([0.0, 0.125, 0.5])


def stop_of(rule: EarlyStopping, series: list[float], eval_every: int = 1) -> int | None:
    """Index of the evaluation that stops; evaluation i is at step (i + 1) eval_every."""
    return next((i for i, value in enumerate(series) if rule.observe((i + 1) * eval_every, value)), None)


@pytest.mark.parametrize(("min_delta", "index", "best"), [(0.01, 5, 2.4), (0.0, 8, 2.399)])
def test_a_printed_series(min_delta: float, index: int, best: float):
    rule = EarlyStopping(patience=3, min_delta=min_delta)
    assert stop_of(rule, SERIES, eval_every=31) == index
    assert (rule.best, rule.best_step) == (best, (SERIES.index(best) + 1) * 31)


def test_nothing_counts_within_the_grace_period():
    """The count starts with the first evaluation after it; the best from within stays the one to restore."""
    rule = EarlyStopping(patience=3, grace_steps=6)
    worse = [2.4, *[2.5] * 20]
    assert stop_of(rule, worse) == 8  # steps 7, 8, 9
    assert (rule.best, rule.best_step) == (2.4, 1)
    assert stop_of(EarlyStopping(patience=3, min_delta=0.01, grace_steps=len(SERIES)), SERIES) is None


def test_what_equals_the_best_is_no_improvement():
    rule = EarlyStopping(patience=2)
    assert stop_of(rule, [2.0, 2.0, 2.0]) == 2
    assert rule.best_step == 1


@given(start=st.integers(1, 40), falls=st.lists(st.integers(1, 8), max_size=30), patience=st.integers(1, 3))
def test_an_improving_series_never_stops(start: int, falls: list[int], patience: int):
    """Each evaluation is at least 1/8 below the one before, and min_delta 1/16."""
    series = [start + sum(falls[i:]) / 8 for i in range(len(falls) + 1)]
    rule = EarlyStopping(patience, min_delta=0.0625)
    assert stop_of(rule, series) is None
    assert (rule.best, rule.best_step) == (start, len(series))


def reference_stop(series: list[float], patience: int, min_delta: float, grace: int) -> tuple[int | None, int]:
    """(index that stops, index of the best), from the list of all improvements instead of a count."""
    improvements: list[int] = []
    for i, value in enumerate(series):
        if not improvements or value < series[improvements[-1]] - min_delta:
            improvements.append(i)
        # Evaluation i is at step i + 1, so those with an index from grace on are after the grace period.
        if i - max(improvements[-1], grace - 1) >= patience:
            return i, improvements[-1]
    return None, improvements[-1]


@given(series=VALUES, patience=st.integers(1, 5), min_delta=DELTAS, grace=st.integers(0, 12))
def test_against_the_list_of_improvements(series: list[float], patience: int, min_delta: float, grace: int):
    rule = EarlyStopping(patience, min_delta, grace)
    stop, best = reference_stop(series, patience, min_delta, grace)
    assert stop_of(rule, series) == stop
    assert (rule.best, rule.best_step) == (series[best], best + 1)


@given(series=VALUES, cut=st.integers(0, 30), patience=st.integers(1, 5), min_delta=DELTAS, grace=st.integers(0, 12))
def test_resumed_anywhere_it_decides_the_same(series, cut: int, patience: int, min_delta: float, grace: int):
    whole, first, second = (EarlyStopping(patience, min_delta, grace) for _ in range(3))
    expected = [whole.observe(i, value) for i, value in enumerate(series)]
    found = [first.observe(i, value) for i, value in enumerate(series[:cut])]
    second.load_state_dict(first.state_dict())
    found += [second.observe(i, value) for i, value in enumerate(series[cut:], start=min(cut, len(series)))]
    assert found == expected
    assert (second.best, second.best_step) == (whole.best, whole.best_step)


def test_a_stop_before_the_phases_begin():
    """Evaluations every 500 of 24,914 steps, patience 10; phases begin at 30 % and 60 %.

    Without a grace period the run can stop before both, and the one that stopped at step 12,500 never saw the second.
    """
    phases = [0.3 * 24_914, 0.6 * 24_914]
    assert earliest_stop(500, 10) == 5_500 < phases[0] < 12_500 < phases[1]
    # 7,474.2 and 14,948.4: the last evaluations within are the 14th and the 29th.
    assert earliest_stop(500, 10, math.ceil(phases[0])) == 12_000
    assert earliest_stop(500, 10, math.ceil(phases[1])) == 19_500


@given(every=st.integers(1, 40), patience=st.integers(1, 6), grace=st.integers(0, 200))
def test_earliest_stop_is_where_a_flat_series_stops(every: int, patience: int, grace: int):
    flat = [2.0] * (grace + patience + 2)
    index = stop_of(EarlyStopping(patience, 0.0, grace), flat, every)
    assert index is not None
    assert (index + 1) * every == earliest_stop(every, patience, grace)


@given(series=VALUES, every=st.integers(1, 5), patience=st.integers(1, 5), min_delta=DELTAS, grace=st.integers(0, 40))
def test_no_series_stops_before_the_earliest_stop(series, every: int, patience: int, min_delta: float, grace: int):
    index = stop_of(EarlyStopping(patience, min_delta, grace), series, every)
    assert index is None or (index + 1) * every >= earliest_stop(every, patience, grace)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EarlyStopping(0), "patience must be at least 1 evaluation, not 0"),
        (lambda: EarlyStopping(1, -0.1), "min_delta must be at least 0, not -0.1"),
        (lambda: EarlyStopping(1, grace_steps=-1), "grace_steps must be at least 0, not -1"),
        (lambda: EarlyStopping(1).observe(10, math.nan), "val_ce must be finite, not nan"),
        (lambda: earliest_stop(0, 3), r"eval_every \(0\)"),
        (lambda: earliest_stop(50, 0), "patience must be at least 1"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()

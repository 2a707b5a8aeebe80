"""Stages, their boundaries and order by worked numbers; the switch rules against direct forms; resumption."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.schedules import (
    POCL_STAGES,
    ByPatience,
    ByPlateau,
    ByTime,
    Curriculum,
    Stage,
    ramp,
    stage_at,
    stage_order,
    stage_sizes,
)

QUARTERS = [0.25, 0.5, 0.75, 1.0]
# In steps of 1/8, of which floats hold all sums and all means over 1, 2 or 4 exactly.
VALUES = st.lists(st.integers(0, 24).map(lambda i: i / 8), min_size=1, max_size=40)
RULES = st.one_of(
    st.builds(ByPlateau, st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.125, 0.5]), st.integers(1, 3)),
    st.builds(ByPatience, st.integers(1, 4), st.sampled_from([0.0, 0.125, 0.5])),
)


def switches(curriculum: Curriculum, series: list[float]) -> list[int]:
    """Indices of the evaluations after which another stage begins."""
    return [i for i, value in enumerate(series) if curriculum.observe(value)]


@pytest.mark.parametrize(
    ("n", "volumes", "sizes"),
    [
        (10, QUARTERS, [2, 4, 6, 10]),
        (100, QUARTERS, [25, 50, 75, 100]),
        # Tenths, of which floats hold no exact differences.
        (100, [i / 10 for i in range(1, 11)], list(range(10, 101, 10))),
        (9, [1 / 3, 2 / 3, 1.0], [3, 6, 9]),
        (7, [0.1 + 0.2, 1.0], [2, 7]),
        (10, [0.2, 0.9, 1.0], [2, 9, 10]),
        (5, [1.0], [5]),
    ],
)
def test_sizes(n: int, volumes: list[float], sizes: list[int]):
    assert stage_sizes(n, volumes) == sizes


@given(stages=st.integers(1, 12), rest=st.integers(0, 500))
def test_equal_steps_have_the_sizes_of_the_paper(stages: int, rest: int):
    n = stages + rest
    volumes = [(i + 1) / stages for i in range(stages)]
    assert stage_sizes(n, volumes) == [n // stages * (i + 1) for i in range(stages - 1)] + [n]


@given(volumes=st.sets(st.integers(1, 99), max_size=8), n=st.integers(100, 5000))
def test_sizes_rise_to_n_and_stay_near_their_volumes(volumes: set[int], n: int):
    percent = [*sorted(volumes), 100]
    sizes = stage_sizes(n, [p / 100 for p in percent])
    assert sizes == sorted(sizes)
    assert sizes[-1] == n
    for i, (size, p) in enumerate(zip(sizes, percent, strict=True)):
        # Each of the i + 1 steps is rounded down by less than one example.
        assert Fraction(n * p, 100) - (i + 1) < size <= Fraction(n * p, 100)


def test_stages_of_a_run():
    """0.39999 is before the boundary at 0.4, and 0.4 is behind it."""
    assert [stage_at(x, (0.4, 0.7)) for x in (0.0, 0.39999, 0.4, 0.69999, 0.7, 1.0)] == [0, 0, 1, 1, 2, 2]
    # A step's share of the run meets the boundary that is written with the same digits.
    assert [stage_at(step / 10, (0.4, 0.7)) for step in range(11)] == [0] * 4 + [1] * 3 + [2] * 4
    assert stage_at(0.5, ()) == 0


@given(
    progress=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    boundaries=st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=6).map(sorted),
)
def test_a_later_moment_is_in_no_earlier_stage(progress: tuple[float, float], boundaries: list[float]):
    early, late = (stage_at(x, boundaries) for x in sorted(progress))
    assert 0 <= early <= late <= len(boundaries)
    assert stage_at(1.0, boundaries) == len(boundaries)


def test_settings_of_the_paper():
    assert [stage.volume for stage in POCL_STAGES] == QUARTERS
    assert [stage.temperature for stage in POCL_STAGES] == [1.0, 1.33, 1.67, 2.0]
    assert [stage.w_kd for stage in POCL_STAGES] == [0.7, 0.8, 0.9, 1.0]
    # 8 epochs in each stage: 20 passes over all examples.
    assert 8 * sum(stage.volume for stage in POCL_STAGES) == 20.0


def test_a_temperature_that_rises_without_stages():
    assert [ramp(x, 1.0, 2.0) for x in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.25, 1.5, 2.0]
    assert [ramp(x, 3.0, 2.0) for x in (0.0, 0.5, 1.0)] == [3.0, 2.5, 2.0]


def test_by_time_every_switch_is_told_once():
    curriculum = Curriculum(POCL_STAGES, ByTime((0.2, 0.5, 0.8)))
    told = [step for step in range(101) if curriculum.advance(step, 100)]
    assert told == [20, 50, 80]
    assert curriculum.settings == Stage(1.0, 2.0, 1.0)
    assert not curriculum.observe(3.0)


def test_settings_follow_the_stage():
    curriculum = Curriculum(POCL_STAGES, ByPatience(1))
    volumes, seen = [stage.volume for stage in POCL_STAGES], []
    # The first evaluation is the best; each of the others is a stall, which ends a stage while there is a next one.
    for _ in range(5):
        curriculum.observe(2.0)
        size = stage_sizes(10, volumes)[curriculum.stage]
        seen.append((size, curriculum.settings.temperature, curriculum.settings.w_kd))
    assert seen == [(2, 1.0, 0.7), (4, 1.33, 0.8), (6, 1.67, 0.9), (10, 2.0, 1.0), (10, 2.0, 1.0)]


def test_plateau_by_hand():
    """Windows of 2, eps 1/4, patience 2; the CE jumps at the switch."""
    curriculum = Curriculum([Stage(0.5), Stage(0.75), Stage(1.0)], ByPlateau(window=2, eps=0.25, patience=2))
    # Gains 1, 1/2, 1/4, 1/8 and 0 from the fourth value on; one of just eps does not stall.
    assert switches(curriculum, [4.0, 4.0, 3.0, 3.0, 3.0, 2.5, 3.25, 2.25]) == [7]
    # Three evaluations after the switch make no check: those from before are forgotten.
    assert switches(curriculum, [9.0, 9.0, 9.0]) == []
    assert switches(curriculum, [9.0, 9.0]) == [1]


def test_a_plateau_counts_stalls_in_a_row():
    curriculum = Curriculum([Stage(0.5), Stage(1.0)], ByPlateau(window=1, eps=0.5, patience=2))
    # Gains 0, 1, 0, 0: the first stall is made good.
    assert switches(curriculum, [4.0, 4.0, 3.0, 3.0, 3.0]) == [4]


def test_patience_keeps_the_best_over_a_switch():
    """The second stage starts worse, and has its whole patience to come back below 2.0, which 2.5 does not."""
    rule = ByPatience(patience=3)
    curriculum = Curriculum([Stage(0.3), Stage(0.6), Stage(1.0)], rule)
    assert switches(curriculum, [3.0, 2.0, 2.1, 2.1, 2.1]) == [4]
    assert rule.best == 2.0
    assert switches(curriculum, [5.0, 2.5, 1.9, 1.95, 1.95, 1.95]) == [5]
    assert rule.best == 1.9


def plateau_over(values: list[float], window: int, eps: float, patience: int) -> bool:
    """The last ``patience`` checks of a stage's values all stalled."""
    ends = range(len(values) - patience + 1, len(values) + 1)
    return all(
        end >= 2 * window
        and Fraction(fmean(values[end - 2 * window : end - window])) - Fraction(fmean(values[end - window : end])) < eps
        for end in ends
    )


@given(
    series=VALUES, window=st.sampled_from([1, 2, 4]), eps=st.sampled_from([0.0, 0.125, 0.5]), patience=st.integers(1, 4)
)
def test_plateau_from_the_values_of_each_stage(series: list[float], window: int, eps: float, patience: int):
    curriculum = Curriculum(POCL_STAGES, ByPlateau(window, eps, patience))
    expected, begin = [], 0
    for end in range(1, len(series) + 1):
        if len(expected) < 3 and plateau_over(series[begin:end], window, eps, patience):
            expected.append(end - 1)
            begin = end
    assert switches(curriculum, series) == expected


@given(series=VALUES, patience=st.integers(1, 4))
def test_patience_from_the_lowest_value_so_far(series: list[float], patience: int):
    """Without min_delta: over when the last ``patience`` evaluations, all of this stage, are not below all before."""
    expected, begin = [], 0
    for end in range(1, len(series) + 1):
        before, last = series[: max(0, end - patience)], series[end - patience : end]
        if len(expected) < 3 and end - begin >= patience and before and min(last) >= min(before):
            expected.append(end - 1)
            begin = end
    assert switches(Curriculum(POCL_STAGES, ByPatience(patience)), series) == expected


@pytest.mark.parametrize("make", [lambda: ByPlateau(3, 0.01, 2), lambda: ByPatience(4)])
def test_flat_values_switch_at_the_earliest_evaluations(make: Callable[[], ByPlateau | ByPatience]):
    rule = make()
    found = [i + 1 for i in switches(Curriculum(POCL_STAGES, rule), [2.0] * 60)]
    assert found == [rule.earliest_evaluation(switch) for switch in (1, 2, 3)]
    Curriculum(POCL_STAGES, rule).check_evaluations(found[0])
    with pytest.raises(ValueError, match=f"never leave its first stage: its rule needs {found[0]} evaluations"):
        Curriculum(POCL_STAGES, rule).check_evaluations(found[0] - 1)


def test_what_needs_no_evaluation():
    Curriculum(POCL_STAGES, ByTime((0.2, 0.5, 0.8))).check_evaluations(0)
    Curriculum([Stage(1.0)], ByPlateau(2, 0.1, 1)).check_evaluations(0)


@given(series=VALUES, rule=RULES)
def test_no_series_switches_before_the_earliest_evaluations(series: list[float], rule: ByPlateau | ByPatience):
    for number, index in enumerate(switches(Curriculum(POCL_STAGES, rule), series), start=1):
        assert index + 1 >= rule.earliest_evaluation(number)


@given(series=VALUES, rule=RULES, cut=st.integers(0, 40))
def test_resumed_anywhere_it_decides_the_same(series: list[float], rule: ByPlateau | ByPatience, cut: int):
    whole, first, second = (Curriculum(POCL_STAGES, copy.deepcopy(rule)) for _ in range(3))
    expected = [(whole.observe(value), whole.stage) for value in series]
    found = [(first.observe(value), first.stage) for value in series[:cut]]
    state = first.state_dict()
    # What goes on counting must not reach into the state that was handed out.
    for value in series[cut:]:
        first.observe(value)
    second.load_state_dict(state)
    found += [(second.observe(value), second.stage) for value in series[cut:]]
    assert found == expected


@pytest.mark.parametrize("cut", [39, 40, 41])
def test_by_time_resumed_around_a_switch(cut: int):
    first, second = (Curriculum([Stage(0.3), Stage(0.6), Stage(1.0)], ByTime((0.4, 0.7))) for _ in range(2))
    told = [step for step in range(cut) if first.advance(step, 100)]
    second.load_state_dict(first.state_dict())
    told += [step for step in range(cut, 101) if second.advance(step, 100)]
    assert told == [40, 70]


def test_an_order_is_the_stage_s_windows_by_seed_stage_and_epoch():
    easy_first = np.random.default_rng(0).permutation(1000)
    order = stage_order(easy_first, 250, seed=3, stage=0, epoch=0)
    assert sorted(order) == sorted(easy_first[:250])
    assert np.array_equal(order, stage_order(easy_first.tolist(), 250, 3, 0, 0))
    # 250! orders: any two being equal by chance is out of the question.
    others = [stage_order(easy_first, 250, *key) for key in ((4, 0, 0), (3, 1, 0), (3, 0, 1))]
    for i, one in enumerate([order, *others]):
        assert not any(np.array_equal(one, other) for other in others[i:])


def test_the_order_is_numpy_s_permutation_of_the_seed_sequence():
    """Spelt out, so that a run is resumed in the same order by a later version."""
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, 1, 2])))
    assert stage_order(range(10, 20), 6, 3, 1, 2).tolist() == [10 + i for i in draw.permutation(6)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage_sizes(10, [0.25, 0.75]), r"must end at 1, which is all examples, not 0\.25, 0\.75"),
        (lambda: stage_sizes(10, []), "at least one stage"),
        (lambda: stage_sizes(10, [0.5, 0.5, 1.0]), r"must rise strictly from above 0, not 0\.5, 0\.5, 1\.0"),
        (lambda: stage_sizes(10, [0.0, 1.0]), "must rise strictly from above 0"),
        (lambda: stage_sizes(10, [0.5, math.nan, 1.0]), r"must rise strictly from above 0, not 0\.5, nan, 1\.0"),
        (lambda: stage_sizes(10, [math.nan, 1.0]), "must rise strictly from above 0, not nan"),
        (lambda: stage_sizes(3, QUARTERS), r"holds 0\.25 of 3 examples, less than one"),
        (lambda: stage_at(0.5, (0.7, 0.4)), r"rise strictly between 0 and 1, both left out, not 0\.7, 0\.4"),
        (lambda: stage_at(0.5, (0.4, 0.4)), "rise strictly"),
        (lambda: stage_at(0.5, (0.4, 1.0)), "rise strictly"),
        (lambda: stage_at(math.nan, (0.4,)), "progress must be a share of the run, not nan"),
        (lambda: Curriculum([Stage(1.0)], ByTime(())).advance(0, 0), "total_steps must be at least 1 .*, not 0"),
        (lambda: ByTime((0.0, 0.4)), "rise strictly"),
        (lambda: ByTime((0.4, math.nan)), "rise strictly"),
        (lambda: ByPlateau(2, 0.1, 0), "patience must be at least 1"),
        (lambda: ByPlateau(0, 0.1, 1), r"window \(0\) must be at least 1"),
        (lambda: ByPatience(0), "patience must be at least 1"),
        (lambda: ByPatience(1, -0.5), "min_delta must be at least 0"),
        (lambda: Curriculum([], ByPatience(1)), "at least one stage"),
        (lambda: Curriculum([Stage(0.5)], ByPatience(1)), "must end at 1"),
        (lambda: Curriculum(POCL_STAGES, ByTime((0.4, 0.7))), "4 stages need 3 boundaries between them, not 2"),
        (lambda: Curriculum(POCL_STAGES, ByPlateau(2, 0.1, 1)).check_evaluations(0), "never leave its first stage"),
        (lambda: Curriculum(POCL_STAGES, ByPatience(1)).observe(math.inf), "val_ce must be finite, not inf"),
        (lambda: stage_order([1, 2], 3, 0, 0, 0), "3 windows cannot be taken from 2"),
        (lambda: stage_order([], 0, 0, 0, 0), "0 windows cannot be taken from 0"),
    ],
)
def test_refusals(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()

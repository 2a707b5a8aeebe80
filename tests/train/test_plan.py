"""Schedules as the run has them: worked values, and what a dry run draws of them."""

import math

import pytest

from asnn_goose.config.losses import Ramp
from asnn_goose.train.plan import BLOCKS, along, drawn, schedules

KD = "distillation__losses__forward_kl__ramp"
T = "distillation__temperature"


def course(experiment, name: str, steps) -> list[float]:
    return [schedules(experiment, step)[name] for step in steps]


def test_a_weight_that_warms_up_over_a_fifth(tiny_experiment):
    ramp = {f"{KD}__start": 0.1, f"{KD}__end": 0.2, "distillation__losses__forward_kl__weight": 0.7}
    experiment = tiny_experiment("v10", train__steps=100, **ramp)
    found = course(experiment, "weight_forward_kl", (0, 4, 5, 10, 15, 20, 99))
    assert found == pytest.approx([0.1, 0.22, 0.25, 0.4, 0.55, 0.7, 0.7], abs=1e-12)
    assert course(experiment, "weight_ce", (0, 50)) == [1.0, 1.0]


def test_a_phase_between_30_and_60_per_cent(tiny_experiment):
    phase = {f"{KD}__start": 0.0, f"{KD}__begin": 0.3, f"{KD}__end": 0.6}
    weight = {"train__steps": 24_914, "distillation__losses__forward_kl__weight": 0.1}
    experiment = tiny_experiment("v10", **phase, **weight)
    assert course(experiment, "weight_forward_kl", (12_500,))[0] == pytest.approx(0.067242, abs=1e-6)


@pytest.mark.parametrize(("shape", "wanted"), [("cosine", 1 + (1 - math.cos(math.pi / 4))), ("linear", 1.5)])
def test_a_ramp_has_the_shape_that_it_is_given(shape, wanted):
    """A quarter of the way from 1 at 20 % to 3 at 60 %."""
    assert along(Ramp(start=1.0, begin=0.2, end=0.6, shape=shape), 3.0, 0.3) == pytest.approx(wanted, rel=1e-12)


def test_temperatures_rise_and_fall(tiny_experiment):
    def temperatures(start, init):
        ramp = {f"{T}__ramp__start": start, f"{T}__ramp__end": 1.0, f"{T}__init": init}
        return course(tiny_experiment("v10", train__steps=100, **ramp), "temperature", (0, 25, 50, 100))

    assert temperatures(1.0, 2.0) == pytest.approx([1, 1.25, 1.5, 2])
    assert temperatures(3.0, 2.0) == pytest.approx([3, 2.75, 2.5, 2])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_lambda_holds_and_rises(tiny_experiment, shape):
    changes = {f"{T}__lambda_shape": shape, f"{T}__lambda_end": 0.7, f"{T}__lambda_max": 0.8, "train__steps": 100}
    found = course(tiny_experiment("v11_1", **changes), "temperature_lambda", (0, 20, 30, 45, 70, 99))
    way = {"linear": 0.2, "cosine": (1 - math.cos(0.2 * math.pi)) / 2}[shape]
    assert found == pytest.approx([0, 0, 0.8 * way, 0.4, 0.8, 0.8])


def test_a_dry_run_draws_each_schedule_once(tiny_experiment):
    experiment = tiny_experiment("v11_1", train__steps=100, **{f"{KD}__start": 0.0, f"{KD}__end": 1.0})
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in drawn(experiment)}
    assert set(lines) == set(schedules(experiment, 0))
    rise, numbers = lines["weight_forward_kl"].split(maxsplit=1)
    assert list(rise) == sorted(rise, key=BLOCKS.index) and (rise[0], rise[-1]) == (BLOCKS[0], BLOCKS[-1])
    assert numbers == "0 .. 0.495 .. 0.495"

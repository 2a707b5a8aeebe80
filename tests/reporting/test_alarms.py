import numpy as np
import pytest

from asnn_goose.config.distillation import TemperatureConfig
from asnn_goose.reporting.alarms import find_alarms, spike_alarms, temperature_alarms

CONFIG = TemperatureConfig(mode="learned", init=2.0, low=1.0, high=5.0)


def lines(temperature, **more):
    return [
        {"step": step, "temperature": float(value), **{name: float(column[step]) for name, column in more.items()}}
        for step, value in enumerate(temperature)
    ]


# 5 % of the range (1, 5) is 0.2: 4.85 is near the bound, 4.75 is not.
@pytest.mark.parametrize(
    ("near", "value", "rings"), [(51, 4.85, True), (50, 4.85, False), (51, 4.75, False), (51, 1.15, True)]
)
def test_a_temperature_at_a_bound_rings_after_fifty_steps(near, value, rings):
    temperature = np.concatenate([np.full(10, 3.0), np.full(near, value), np.full(10, 3.0)])
    alarms = temperature_alarms(lines(temperature), CONFIG)
    assert ["bound" in alarm for alarm in alarms] == [True] * rings
    if rings:
        assert f"from step 10 to {10 + near - 1}" in alarms[0]


def test_two_short_stays_do_not_add_up():
    temperature = np.concatenate([np.full(40, 4.9), [3.0], np.full(40, 4.9)])
    assert temperature_alarms(lines(temperature), CONFIG) == []


def test_a_temperature_that_never_moves_is_told():
    anchor = {"temperature_anchor": np.full(100, 2.0)}
    assert "never left its anchor " in temperature_alarms(lines(np.full(100, 2.03), **anchor), CONFIG)[0]
    assert temperature_alarms(lines(np.linspace(2, 2.05, 100), **anchor), CONFIG) == []


def test_a_temperature_that_only_follows_its_anchor_has_learned_nothing():
    anchor = {"temperature_anchor": np.linspace(2.0, 3.0, 100)}
    assert "never left its anchor " in temperature_alarms(lines(np.linspace(2.0, 3.02, 100), **anchor), CONFIG)[0]
    assert temperature_alarms(lines(np.linspace(2.0, 2.5, 100), **anchor), CONFIG) == []


def game(sign):
    """T follows sign * lr * lambda * G, with a gradient that changes at random."""
    gradient = np.random.default_rng(0).normal(size=200)
    temperature = 3.0 + np.concatenate([[0], np.cumsum(sign * 0.01 * gradient)[:-1]])
    return temperature, gradient


@pytest.mark.parametrize(("sign", "strength", "rings"), [(1, 1.0, False), (-1, 1.0, True), (-1, 0.4, False)])
def test_a_temperature_that_minimises_is_found_while_the_adversary_is_strong(sign, strength, rings):
    temperature, gradient = game(sign)
    metrics = lines(temperature, temperature_gradient=gradient, temperature_lambda=np.full(200, strength))
    assert ["against its adversarial gradient" in alarm for alarm in temperature_alarms(metrics, CONFIG)] == [
        True
    ] * rings


def test_an_unrelated_gradient_is_no_sign_error():
    temperature, _ = game(1)
    gradient = np.random.default_rng(1).normal(size=200)
    metrics = lines(temperature, temperature_gradient=gradient, temperature_lambda=np.ones(200))
    assert temperature_alarms(metrics, CONFIG) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"spikes.rate": 0.049}, "firing rate is 0.04900"),
        ({"spikes.rate": 0.61}, "outside 0.05 to 0.6"),
        ({"spikes.dead_fraction": 0.051}, "5.1 % of the channels never spiked, not less than 5.0 %."),
        ({"spikes.saturated_fraction": 0.102}, "10.2 % of the channels spiked always, not less than 10.0 %."),
        ({"spikes.operand_fraction": 0.89}, "89.0 % of the mixer"),
        ({"spikes.per_layer.2.dead_fraction": 0.7}, "Layer 2, receptance: 70.0 %"),
    ],
)
def test_spike_alarms(make_result, changes, told):
    alarms = spike_alarms(make_result(changes))
    assert alarms == [] if told is None else len(alarms) == 1 and told in alarms[0]


def test_all_sources_come_together_once(make_result, make_experiment):
    metrics = [{"step": 3, "grad_norm": None, "non_finite": ["grad_norm"]}, {"step": 4, "lr": 1.0}]
    result = make_result({"alarms": ("a", "a"), "spikes.rate": 0.7})
    alarms = find_alarms(result, metrics, make_experiment())
    assert alarms[0] == "a"
    assert alarms[1] == "grad_norm was not finite on 1 logged line, first at step 3."
    assert "firing rate" in alarms[2] and len(alarms) == 3


def test_controls_without_spikes_ring_no_spike_alarm(make_result, make_experiment):
    dense = make_experiment({"student.neuron.kind": "dense"})
    assert find_alarms(make_result({"alarms": (), "spikes.operand_fraction": 0.0}), [], dense) == []


def test_a_biased_objective_and_steps_left_out_are_told(make_experiment, make_result):
    plain, biased = make_experiment(), make_experiment({"distillation.losses.tcs": {"weight": 0.5, "k": 100}})
    told = find_alarms(make_result(), [{"step": 3, "skipped_steps": 2}], plain)
    assert "2 optimiser steps were left out: their loss or gradient was not finite." in told
    one = find_alarms(make_result(), [{"step": 3, "skipped_steps": 1}], plain)
    assert "1 optimiser step was left out: its loss or gradient was not finite." in one
    assert not any("biased" in alarm for alarm in told)
    told = find_alarms(make_result(), [], biased)
    assert any(alarm.startswith("The objective is biased: tcs renormalises both sides") for alarm in told)


def test_a_temperature_learned_from_a_cut_divergence_is_told(make_experiment, make_result):
    cut = {"distillation.losses.tail_bucket_kl": {"weight": 0.5, "k": 37}}
    learned, fixed = ({**cut, "distillation.temperature.mode": mode} for mode in ("learned", "fixed"))
    told = [find_alarms(make_result(), [], make_experiment(changes)) for changes in (learned, fixed)]
    assert ["is learned from tail_bucket_kl" in " ".join(alarms) for alarms in told] == [True, False]

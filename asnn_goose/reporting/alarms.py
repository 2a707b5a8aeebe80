"""Signs of ill health that a run's own files show, each told in a sentence."""

import itertools

import numpy as np

from asnn_goose.config.distillation import TemperatureConfig
from asnn_goose.config.losses import BIASED, CUT
from asnn_goose.config.schema import SPIKING, Experiment
from asnn_goose.reporting.firing_bars import DEAD_BELOW, RATE_HIGH, RATE_LOW, SATURATED_BELOW, kept
from asnn_goose.reporting.health import training_alarms
from asnn_goose.reporting.markdown import counted, number, percent
from asnn_goose.reporting.metrics import Metrics, series
from asnn_goose.reporting.record import Result

OPERAND_LOW = 0.9
"""Share of the mixers' products that are to have a spike operand."""
PATIENCE = 50
"""Optimiser steps that a temperature may stay at a bound."""


def find_alarms(result: Result, metrics: Metrics, experiment: Experiment) -> list[str]:
    """All alarms: those that training recorded, those of the files, and what the objective itself gives cause for."""
    alarms = [*result.alarms, *_non_finite(metrics), *biased_losses(experiment), *_skipped(metrics)]
    alarms += training_alarms(metrics, experiment)
    if experiment.distillation.temperature.mode != "fixed":
        alarms += temperature_alarms(metrics, experiment.distillation.temperature)
        alarms += [
            f"The temperature is learned from {name}, whose slope in T is not that of the divergence over the whole "
            "vocabulary and often has the other sign."
            for name in CUT
            if name in experiment.distillation.losses.present()
        ]
    if experiment.student.neuron.kind in SPIKING:
        alarms += spike_alarms(result)
    return list(dict.fromkeys(alarms))


def biased_losses(experiment: Experiment) -> list[str]:
    """Terms of the objective whose optimum is not the teacher."""
    terms = experiment.distillation.losses.present()
    return [f"The objective is biased: {reason}." for name, reason in BIASED.items() if name in terms]


def _skipped(metrics: Metrics) -> list[str]:
    count = max((line.get("skipped_steps") or 0 for line in metrics), default=0)
    if not count:
        return []
    steps, whose = ("1 optimiser step was", "its") if count == 1 else (f"{count:.0f} optimiser steps were", "their")
    return [f"{steps} left out: {whose} loss or gradient was not finite."]


def temperature_alarms(metrics: Metrics, config: TemperatureConfig) -> list[str]:
    """Watch a learned temperature T in (low, high).

    Alarms: T within 5 % of the range of a bound for PATIENCE optimiser steps; T moving against its adversarial
    gradient, corr(dT, G) < 0 while lambda > 0.5 (G = dL_KD/dT; T should rise where G is positive), beyond what chance
    gives n pairs (2 / sqrt(n)); T that never left the anchor by 1 % of the range, which makes learning it a no-op.
    """
    steps, temperature = series(metrics, "temperature")
    if len(steps) == 0:
        return []
    alarms = []
    span = config.high - config.low
    for bound in (config.low, config.high):
        begin, end = _longest_stretch(steps, np.abs(temperature - bound) < 0.05 * span)
        if end - begin >= PATIENCE:
            alarms.append(
                f"The temperature stayed within 5 % of its range of the bound {bound:g} from step {begin} to {end}."
            )
    away = [
        abs(line["temperature"] - line["temperature_anchor"])
        for line in metrics
        if line.get("temperature") is not None and line.get("temperature_anchor") is not None
    ]
    if away and max(away) < 0.01 * span:
        alarms.append(
            "The learned temperature never left its anchor by more than 1 % of its range: learning it changed nothing."
        )
    correlation, pairs = _adversarial_correlation(metrics)
    if pairs >= 8 and correlation < -2 / np.sqrt(pairs):
        alarms.append(
            f"The temperature moved against its adversarial gradient (correlation {correlation:.2f} over {pairs} "
            "intervals with lambda above 0.5): look for a sign error."
        )
    return alarms


def spike_alarms(result: Result) -> list[str]:
    """Firing outside the healthy range, over the whole network and site by site."""
    spikes = result.spikes
    if spikes is None:
        return []
    alarms, healthy = [], kept(spikes)
    if not healthy.rate:
        alarms.append(f"The mean firing rate is {number(spikes.rate)}, outside {RATE_LOW} to {RATE_HIGH}.")
    if not healthy.dead:
        dead = percent(spikes.dead_fraction)
        alarms.append(f"{dead} of the channels never spiked, not less than {percent(DEAD_BELOW)}.")
    if not healthy.saturated:
        saturated = percent(spikes.saturated_fraction)
        alarms.append(f"{saturated} of the channels spiked always, not less than {percent(SATURATED_BELOW)}.")
    if spikes.operand_fraction < OPERAND_LOW:
        alarms.append(
            f"{percent(spikes.operand_fraction)} of the mixer matrices' multiply-accumulates have a spike operand, "
            f"less than {percent(OPERAND_LOW)}."
        )
    for site in spikes.per_layer:
        if site.dead_fraction > 0.5:
            alarms.append(f"Layer {site.layer}, {site.site}: {percent(site.dead_fraction)} of the channels are dead.")
    return alarms


def _non_finite(metrics: Metrics) -> list[str]:
    lines = [line for line in metrics if line.get("non_finite")]
    if not lines:
        return []
    names = sorted({name for line in lines for name in line["non_finite"]})
    verb = "was" if len(names) == 1 else "were"
    where = counted(len(lines), "logged line")
    return [f"{', '.join(names)} {verb} not finite on {where}, first at step {lines[0]['step']}."]


def _longest_stretch(steps: np.ndarray, inside: np.ndarray) -> tuple[int, int]:
    best, begin = (0, 0), None
    for step, flag in zip(steps.tolist(), inside.tolist(), strict=True):
        begin = (step if begin is None else begin) if flag else None
        if begin is not None and step - begin > best[1] - best[0]:
            best = (begin, step)
    return best


def _adversarial_correlation(metrics: Metrics) -> tuple[float, int]:
    """Correlation of G with the change of T up to the next logged line, over lines with lambda > 0.5."""
    keys = ("temperature", "temperature_gradient", "temperature_lambda")
    lines = [line for line in metrics if all(line.get(key) is not None for key in keys)]
    pairs = [
        (now["temperature_gradient"], after["temperature"] - now["temperature"])
        for now, after in itertools.pairwise(lines)
        if now["temperature_lambda"] > 0.5
    ]
    if len(pairs) < 2:
        return 0.0, len(pairs)
    gradient, change = np.array(pairs).T
    if gradient.std() == 0 or change.std() == 0:
        return 0.0, len(pairs)
    return float(np.corrcoef(gradient, change)[0, 1]), len(pairs)

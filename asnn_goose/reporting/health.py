"""How a training run went, from its metrics alone: alarms, and plain sentences. What was not logged is not told."""

import math
from itertools import accumulate

import numpy as np

from asnn_goose.config.schema import Experiment
from asnn_goose.reporting.markdown import number, percent
from asnn_goose.reporting.metrics import Metrics, series

EXPLODING = 3.0
"""Times its running minimum that a logged loss may reach after warm-up."""
STUCK = 1e-3
"""Relative change of validation cross-entropy below which the second half of a run did nothing."""
UNIFORM = 0.98
"""Share of ln V from which on the teacher's tempered targets say next to nothing."""
SILENT = 0.01
"""Gradient of a term, relative to that of ce, below which the term is out of the game."""
FEWEST = 4
"""Looks at validation that a statement about their course needs."""


def training_alarms(metrics: Metrics, experiment: Experiment) -> list[str]:
    """All alarms of this file."""
    return [
        *course_alarms(metrics),
        *explosion_alarms(metrics, experiment),
        *target_alarms(metrics),
        *gradient_alarms(metrics),
    ]


def course_alarms(metrics: Metrics) -> list[str]:
    """Validation cross-entropy that does not fall, or that has stopped moving."""
    _, ce = series(metrics, "val_ce")
    if len(ce) < FEWEST:
        return []
    third, alarms = len(ce) // 3, []
    first, last = ce[:third].mean(), ce[-third:].mean()
    if last >= first:
        alarms.append(
            f"Validation cross-entropy did not fall: {number(first)} nats over the first third of the looks, "
            f"{number(last)} over the last."
        )
    half = ce[len(ce) // 2 :]
    if np.ptp(half) < STUCK * abs(half[0]):
        alarms.append(
            f"Validation cross-entropy is stuck: over the second half of the looks it moved by less than "
            f"{percent(STUCK)} of {number(half[0])} nats."
        )
    return alarms


def explosion_alarms(metrics: Metrics, experiment: Experiment) -> list[str]:
    """Raw losses above EXPLODING times their running minimum, counted from the end of the learning rate's warm-up."""
    begin = experiment.train.warmup * experiment.train.total_steps(experiment.data.window)
    names = dict.fromkeys(key for line in metrics for key in line if key.startswith("loss_") and key.endswith("_raw"))
    alarms = []
    for name in names:
        steps, values = series(metrics, name)
        steps, values = steps[steps > begin], values[steps > begin]
        lows = list(accumulate(values.tolist(), min))
        found = [i for i in range(len(values)) if lows[i] > 0 and values[i] > EXPLODING * lows[i]]
        if found:
            i = found[0]
            alarms.append(
                f"{name} exploded: {number(values[i])} at step {steps[i]}, more than {EXPLODING:g} times its lowest "
                f"value until then, {number(lows[i])}."
            )
    return alarms


def target_alarms(metrics: Metrics) -> list[str]:
    """Targets so flat that imitating them teaches nothing."""
    steps, shares = series(metrics, "target_entropy_share")
    if not (shares > UNIFORM).any():
        return []
    i = int((shares > UNIFORM).argmax())
    return [
        f"The teacher's tempered targets were nearly uniform at step {steps[i]}: their entropy is {percent(shares[i])} "
        "of the largest possible, so that a low divergence from them means little. Lower the temperature."
    ]


def gradient_alarms(metrics: Metrics) -> list[str]:
    """Terms whose weighted gradient stayed below SILENT times that of ce at every look."""
    return [
        f"The loss {name} has next to no influence: its weighted gradient is at most {number(ratios.max())} times that "
        "of ce. Raise its weight, or leave it out."
        for name, ratios in _gradient_ratios(metrics).items()
        if ratios.max() < SILENT
    ]


def logit_error(raw: float) -> float:
    """sqrt(2 T^2 KL): root-mean-square error of the student's centred logits, over tokens and vocabulary.

    The limit of a high temperature, where T^2 KL is half the variance of s - t over the vocabulary; at T near 1 the
    teacher's likely tokens count for more, and it is an order of magnitude and no measurement.

    Args:
        raw: T^2 KL(p || q) in nats, which loss_forward_kl_raw is.
    """
    return math.sqrt(2.0 * max(0.0, raw))


def sentences(metrics: Metrics) -> list[str]:
    """The run's health in plain words, each sentence from what was logged."""
    found = []
    steps, ce = series(metrics, "val_ce")
    if len(steps) > 1:
        found.append(
            f"Validation cross-entropy went from {number(ce[0])} nats at step {steps[0]} to {number(ce[-1])} at step "
            f"{steps[-1]}; its lowest was {number(ce.min())}."
        )
    _, kl = series(metrics, "val_kl")
    if len(kl):
        found.append(
            f"The divergence from the teacher ended at {number(kl[-1])} nats (T = 1). A rule of thumb calls more than "
            "8 broken, 3 to 5 early, 1 to 2 on its way and less than 1 close; it is a heuristic, since independent "
            "logits of standard deviation s alone give about s²."
        )
    _, raw = series(metrics, "loss_forward_kl_raw")
    if len(raw):
        found.append(
            f"The last logged T² KL of {number(raw[-1])} stands for a root-mean-square error of "
            f"{number(logit_error(raw[-1]))} in the centred logits, in the approximation of a high temperature."
        )
    steps, entropy = series(metrics, "target_entropy")
    _, mass = series(metrics, "target_top100_mass")
    if len(steps) and len(mass):
        found.append(
            f"The teacher's targets had an entropy of {number(entropy[-1])} nats at the last temperature, with "
            f"{percent(mass[-1])} of their mass on the 100 best tokens."
        )
    if ratios := _gradient_ratios(metrics):
        listed = ", ".join(f"{number(values[-1])} ({name})" for name, values in ratios.items())
        found.append(f"At the last look the weighted gradients stood to that of ce as {listed} to 1.")
    return found


def _gradient_ratios(metrics: Metrics) -> dict[str, np.ndarray]:
    """Term -> its logged ratios to ce, where there are any."""
    prefix = "grad_ratio_"
    names = dict.fromkeys(key for line in metrics for key in line if key.startswith(prefix))
    found = {name.removeprefix(prefix): series(metrics, name)[1] for name in names}
    return {name: ratios for name, ratios in found.items() if len(ratios)}

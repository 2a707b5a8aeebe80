"""The section of a report on how the probed neurons fire and what their spikes tell of the teacher."""

import math

from asnn_goose.reporting.firing_bars import DEAD_BELOW, RATE_HIGH, RATE_LOW, SATURATED_BELOW, kept
from asnn_goose.reporting.information_record import Controlled, InformationResult, SiteInformation
from asnn_goose.reporting.markdown import in_words, integer, percent, table
from asnn_goose.reporting.material import Material
from asnn_goose.reporting.record import SiteSpikes


def carried(material: Material) -> list[str]:
    """A row by probed population: health, similarity and probes, each with its control; and what they say."""
    information, spikes = material.run.result.information, material.run.result.spikes
    # Runs of November 2026 probed levels too, which no neuron spikes.
    if information is None or spikes is None or not material.run.spikes:
        return []
    firing = {(site.layer, site.site): site for site in spikes.per_layer}
    pairs = [(site, firing[site.layer, site.site]) for site in information.sites]
    header = [
        "spikes in front of",
        f"dead (< {percent(DEAD_BELOW)})",
        f"saturated (< {percent(SATURATED_BELOW)})",
        f"firing rate ({RATE_LOW} to {RATE_HIGH})",
        "teacher's layer",
        "debiased CKA",
        "top-1 accuracy",
        "R² of states",
        "mutual information, bits",
    ]
    healthy = [kept(site) for site in spikes.per_layer]
    dead, saturated, rate = (sum(column) for column in zip(*healthy, strict=True))
    return [
        "## What the spikes carry",
        "",
        *table(header, [_row(*pair) for pair in pairs]),
        "",
        f"**Reading.** {_reading(information)}",
        "",
        f"In brackets: the same with the teacher's side of other tokens; bold: outside its bar. Of all {len(healthy)} "
        f"populations {dead} have few enough dead channels, {saturated} few enough saturated ones, and {rate} a rate "
        f"within its bounds. {_method(information)}",
    ]


def _row(site: SiteInformation, firing: SiteSpikes) -> list[str]:
    healthy = kept(firing)
    return [
        f"{in_words(site.site)}, layer {site.layer}",
        _marked(percent(firing.dead_fraction), healthy.dead),
        _marked(percent(firing.saturated_fraction), healthy.saturated),
        _marked(f"{firing.rate:.3f}", healthy.rate),
        str(site.teacher_layer),
        _beside(site.cka),
        f"{percent(site.top1_accuracy.value)} ({percent(site.top1_accuracy.shuffled)})",
        _beside(site.states_r2),
        _beside(site.binned_bits),
    ]


def _reading(information: InformationResult) -> str:
    """What the best population of each probe gives, and whether a control explains it."""
    first = max(information.sites, key=lambda site: site.top1_accuracy.value)
    state = max(information.sites, key=lambda site: site.states_r2.value)
    accuracy, explained = first.top1_accuracy, state.states_r2
    chance = max(accuracy.shuffled, information.majority)
    # Two standard errors of a share of n tokens are at most 1 / sqrt(n).
    told = accuracy.value > chance + 1.0 / math.sqrt(information.coverage * information.held_out_tokens)
    verdict = f"the spikes tell {'of' if told else 'no more than chance of'} the teacher's next token"
    return (
        f"At best a linear map of the spikes finds {percent(accuracy.value)} of the teacher's first choices on "
        f"held-out tokens (layer {first.layer}; {percent(information.majority)} by always naming the commonest, "
        f"{percent(accuracy.shuffled)} with other tokens' choices) and explains {percent(explained.value)} of the "
        f"variance of its states (layer {state.layer}; {percent(explained.shuffled)} with other tokens' states): "
        f"{verdict}."
    )


def _method(information: InformationResult) -> str:
    bias = sum(site.binned_bias_bits for site in information.sites) / len(information.sites)
    return (
        f"Measured on {integer(information.tokens)} test tokens of {information.windows} windows, the last "
        f"{integer(information.held_out_tokens)} held out. The probe knows the {information.classes} commonest first "
        f"choices, which {percent(information.coverage)} of the held-out tokens have, and is judged on these. Mutual "
        f"information pairs channels of spikes and teacher by their number; where they are independent its estimate "
        f"is about {bias:.3f}, and a low one says nothing against the spikes."
    )


def _beside(measured: Controlled) -> str:
    # Adding 0 turns a rounded -0 into 0.
    value, shuffled = (round(part, 3) + 0.0 for part in (measured.value, measured.shuffled))
    return f"{value:.3f} ({shuffled:.3f})"


def _marked(text: str, healthy: bool) -> str:
    return text if healthy else f"**{text}**"

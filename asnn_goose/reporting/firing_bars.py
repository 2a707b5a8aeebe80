"""The bars of healthy spiking, for one population of neurons and for the whole network."""

from typing import NamedTuple

from asnn_goose.reporting.record import SiteSpikes, SpikeResult

DEAD_BELOW, SATURATED_BELOW = 0.05, 0.10
"""Shares of channels that never spike, and that always do."""
RATE_LOW, RATE_HIGH = 0.05, 0.6
"""Firing rates; less is silence, more is no code of sparse events."""


class Kept(NamedTuple):
    """Which bars are kept."""

    dead: bool
    saturated: bool
    rate: bool


def kept(firing: SiteSpikes | SpikeResult) -> Kept:
    """Dead channels below 5 %, saturated ones below 10 %, a rate within [0.05, 0.6]."""
    return Kept(
        firing.dead_fraction < DEAD_BELOW,
        firing.saturated_fraction < SATURATED_BELOW,
        RATE_LOW <= firing.rate <= RATE_HIGH,
    )

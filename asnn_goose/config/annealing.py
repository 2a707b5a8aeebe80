"""The neurons' way from denser ones to what they are at inference."""

from typing import NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat

from asnn_goose.config.settings import Settings


class Annealed(NamedTuple):
    """How far the neurons of a training step are from what they are at inference."""

    mix: float = 1.0
    """Share of spikes in the operand; the rest is the current in units of the gain."""
    threshold: float = 1.0
    """Factor of theta."""
    width: float = 1.0
    """Factor of the surrogate's width."""
    steps: int = 0
    """Micro-steps more than the neuron's own."""


class AnnealingConfig(Settings):
    """What the neurons start from in training; evaluation always sees them as they will be."""

    end: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of the run from which on they are as configured, exactly; up to there every value goes linearly."""
    mix: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of spikes in each operand at the start; the rest is the analog current."""
    threshold: PositiveFloat = 1.0
    """Factor of theta at the start."""
    width: PositiveFloat = 1.0
    """Factor of the surrogate's width at the start."""
    steps: NonNegativeInt = 0
    """Micro-steps that a token has more at the start."""

    def at(self, share: float) -> Annealed:
        """After a share of the run's optimiser steps."""
        x = min(1.0, share / self.end)
        mix, threshold, width = (start + (1.0 - start) * x for start in (self.mix, self.threshold, self.width))
        return Annealed(mix, threshold, width, round(self.steps * (1.0 - x))) if x < 1.0 else Annealed()

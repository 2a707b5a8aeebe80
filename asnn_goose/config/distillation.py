"""What the student is asked to minimise: terms, temperature, balance, and where the teacher's targets come from."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from asnn_goose.config.losses import PROJECTION_TERMS, TEMPERED, Losses
from asnn_goose.config.settings import Settings

FEWEST_KEPT = 16
"""Fewest tokens that a store may cut at: a tail that holds almost everything is no smooth function of T any more."""


class TemperatureConfig(Settings):
    """The softmax temperature of the distillation terms; learned is CTKD (arXiv 2211.16231)."""

    mode: Literal["fixed", "learned"] = "fixed"
    """fixed: init for ever. learned: one scalar that plays against the student behind a gradient reversal."""
    init: PositiveFloat = 2.0
    """Temperature at the start."""
    low: PositiveFloat = 1.0
    """Lower bound of the learned temperature, never reached."""
    high: PositiveFloat = 5.0
    """Upper bound of the learned temperature, never reached."""
    anchor: PositiveFloat | None = None
    """Temperature that the regulariser pulls to; None: init."""
    anchor_weight: NonNegativeFloat = 0.1
    """c in the regulariser c (T - anchor)^2, which stands outside the reversal."""
    lr: PositiveFloat = 0.01
    """Learning rate of the temperature's plain SGD, constant."""
    clip: PositiveFloat = 5.0
    """Largest absolute gradient of the raw temperature."""
    lambda_max: NonNegativeFloat = 1.0
    """Adversary's strength at the end of its cosine ramp."""
    lambda_start: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of the run during which lambda is 0."""
    lambda_end: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the run at which lambda reaches lambda_max."""

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        for key in ("init", "anchor"):
            value = getattr(self, key)
            if self.mode == "learned" and value is not None and not self.low < value < self.high:
                raise ValueError(f"{key} ({value}) must lie strictly between low ({self.low}) and high ({self.high})")
        if not self.lambda_start < self.lambda_end:
            raise ValueError(f"lambda_start ({self.lambda_start}) must be below lambda_end ({self.lambda_end})")
        return self


class BalanceConfig(Settings):
    """How the terms' gradients are brought together, beyond their weights (train/balance.py)."""

    mode: Literal["none", "gradient_norm", "gradnorm", "uncertainty", "pcgrad", "project_kd"] = "none"
    """none: the weights alone. gradient_norm: measured gradient norms in a fixed ratio. gradnorm, uncertainty: learned
    weights. pcgrad: each term gives way where its gradient opposes another's. project_kd: all give way to ce."""
    ratio: PositiveFloat = 1.0
    """gradient_norm: norm of every term's gradient over that of ce."""
    every: PositiveInt = 10
    """gradient_norm: optimiser steps between two measurements."""
    decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """gradient_norm: of the moving average of the norms, per measurement."""
    low: PositiveFloat = 0.1
    """gradient_norm: smallest factor on a weight."""
    high: PositiveFloat = 10.0
    """gradient_norm: largest factor on a weight."""
    lr: PositiveFloat = 0.025
    """gradnorm, uncertainty: learning rate of the learned weights. The factors of uncertainty start at 1/2."""
    strength: PositiveFloat = 1.5
    """gradnorm: how strongly terms that fell less are pushed."""
    start: float = Field(default=0.1, ge=0.0, lt=1.0)
    """gradnorm: share of the run after which the losses are recorded that progress is measured from."""

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low <= self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class DistillationConfig(Settings):
    """What the student is asked to minimise."""

    losses: Losses
    """Terms of the objective by name; the total is the sum of weight times raw value."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of the divergences between logits; the other terms have none, or their own."""
    balance: BalanceConfig = BalanceConfig()
    """Beyond none it takes a gradient per term: one backward pass through the student for each."""
    targets: Literal["online", "hidden", "topk"] = "hidden"
    """online: the teacher runs in every step. hidden: its states of the windows to be read are computed once and kept
    in bfloat16. topk: only its k best tokens are kept (k of tail_bucket_kl), for ce and tail_bucket_kl alone."""

    @model_validator(mode="after")
    def _something_to_minimise(self):
        terms = self.losses.present()
        if not any(term.weight > 0 for term in terms.values()):
            raise ValueError("losses must hold at least one term with a weight above 0")
        if self.temperature.mode == "learned":
            if "random_sampling" in terms:
                raise ValueError("random_sampling cannot train a temperature: set temperature.mode to fixed")
            if not any(terms[name].weight > 0 for name in TEMPERED if name in terms):
                raise ValueError(
                    f"temperature.mode learned needs a loss with a temperature ({', '.join(TEMPERED)}) and a weight "
                    "above 0"
                )
        return self

    @model_validator(mode="after")
    def _balance_has_its_terms(self):
        terms, mode = self.losses.present(), self.balance.mode
        if mode != "none" and len(terms) < 2:
            raise ValueError(f"balance.mode {mode} needs two or more losses: set it to none")
        if mode in ("gradient_norm", "project_kd") and "ce" not in terms:
            raise ValueError(f"balance.mode {mode} compares the losses with ce: give ce a weight")
        ramped = sorted(name for name, term in terms.items() if term.ramp is not None)
        if mode == "gradient_norm" and ramped:
            raise ValueError(
                f"balance.mode gradient_norm sets the size of each gradient, so the ramp of {', '.join(ramped)} would "
                "do nothing: drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _targets_suffice(self):
        names = set(self.losses.present())
        if self.targets == "topk" and (beyond := sorted(names - {"ce", "tail_bucket_kl"})):
            raise ValueError(
                f"targets topk serve ce and tail_bucket_kl alone, not {', '.join(beyond)}: set targets to hidden"
            )
        bucket = self.losses.tail_bucket_kl
        if self.targets == "topk" and (bucket is None or bucket.k < FEWEST_KEPT):
            raise ValueError(
                f"targets topk need the loss tail_bucket_kl, whose k they keep, with a k of {FEWEST_KEPT} or more: set "
                "targets to hidden"
            )
        if self.targets == "hidden" and (beyond := sorted(names & set(PROJECTION_TERMS))):
            raise ValueError(
                f"targets hidden hold no attention projections, which {', '.join(beyond)} needs: set targets to online"
            )
        return self

"""What the student is asked to minimise: terms, temperature, balance, and where the teacher's targets come from."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from asnn_goose.config.curriculum import CurriculumConfig
from asnn_goose.config.losses import PROJECTION_TERMS, TEMPERED, Losses, Ramp
from asnn_goose.config.settings import Settings

FEWEST_KEPT = 16
"""Fewest tokens that a store may cut at: a tail that holds almost everything is no smooth function of T any more."""
TEMPERATURES_KEPT = (1.0, 5.0)
"""Temperatures at which a store has the tail, as kernels/linear_divergence/tail.py keeps it."""

SETS_SIZES = ("gradient_norm", "gradnorm", "uncertainty")
"""Modes of balance that work against a weight which changes in the course of a run."""


class TemperatureConfig(Settings):
    """The softmax temperature of the distillation terms; learned is CTKD (arXiv 2211.16231)."""

    mode: Literal["fixed", "learned", "minimised"] = "fixed"
    """fixed: init, or its ramp. learned: it plays against the student behind a gradient reversal.
    minimised: one scalar that goes down the loss as a weight does, by Adam and clamped, which runs to its bound."""
    scope: Literal["global", "sequence", "token"] = "global"
    """Of a learned one: one temperature for all, for each window, or for each predicted token; the latter two are read
    from the states of teacher and student (CTKD's instance-wise form)."""
    init: PositiveFloat = 2.0
    """Temperature at the start, or with a ramp at its end."""
    ramp: Ramp | None = None
    """A way up or down to init; a learned temperature starts at its start, and its anchor follows it."""
    low: PositiveFloat = 1.0
    """Lower bound; a learned temperature never reaches it, a minimised one is clamped to it."""
    high: PositiveFloat = 5.0
    """Upper bound, likewise."""
    anchor: PositiveFloat | None = None
    """Temperature that the regulariser pulls to; None: init, or what its ramp says."""
    anchor_weight: NonNegativeFloat = 0.1
    """c in the regulariser c (T - anchor)^2, which stands outside the reversal."""
    lr: PositiveFloat = 0.01
    """Learning rate of the temperature's plain SGD (of Adam, where it is minimised), constant."""
    clip: PositiveFloat = 5.0
    """Largest norm of the temperature's gradient, a single raw value's absolute one."""
    lambda_max: NonNegativeFloat = 1.0
    """Adversary's strength at the end of its ramp."""
    lambda_shape: Literal["cosine", "linear"] = "cosine"
    """Way of lambda from 0 to lambda_max."""
    lambda_start: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of the run during which lambda is 0."""
    lambda_end: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the run at which lambda reaches lambda_max."""

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        start = None if self.ramp is None else self.ramp.start
        for key, value in {"init": self.init, "anchor": self.anchor, "ramp.start": start}.items():
            if self.mode != "fixed" and value is not None and not self.low < value < self.high:
                raise ValueError(f"{key} ({value}) must lie strictly between low ({self.low}) and high ({self.high})")
        if start is not None and not start > 0:
            raise ValueError(f"ramp.start ({start}) must be above 0")
        if start is not None and self.mode == "minimised":
            raise ValueError("mode minimised has no ramp: set ramp to null, or mode to fixed or learned")
        if start is not None and self.anchor is not None:
            raise ValueError("the anchor follows a ramp of a learned temperature: leave out anchor, or ramp")
        if self.scope != "global" and self.mode != "learned":
            raise ValueError(f"scope {self.scope} is of a learned temperature: set mode to learned, or scope to global")
        if not self.lambda_start < self.lambda_end:
            raise ValueError(f"lambda_start ({self.lambda_start}) must be below lambda_end ({self.lambda_end})")
        return self


class BalanceConfig(Settings):
    """How the terms' gradients are brought together, beyond their weights (train/balance.py)."""

    mode: Literal["none", "gradient_norm", "gradnorm", "uncertainty", "pcgrad", "project_kd"] = "none"
    """none: the weights alone. gradient_norm: measured gradient norms in a fixed ratio. gradnorm: weights learned from
    the configured ones on. uncertainty: learned weights, in which the configured ones cancel. pcgrad: each term gives
    way where its gradient opposes another's. project_kd: all give way to ce."""
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
    """Beyond none and uncertainty it takes a gradient per term, one backward pass through the student for each:
    gradient_norm every tenth step, gradnorm from its start on."""
    targets: Literal["online", "hidden", "topk"] = "hidden"
    """online: the teacher runs in every step. hidden: its states of the windows to be read are computed once and kept
    in bfloat16. topk: only its k best tokens are kept (k of tail_bucket_kl), for ce and tail_bucket_kl alone."""
    curriculum: CurriculumConfig | None = None
    """Progressive stages; None: all windows from the first step on, in random order."""

    @model_validator(mode="after")
    def _something_to_minimise(self):
        terms = self.losses.present()
        if not any(term.weight > 0 for term in terms.values()):
            raise ValueError("losses must hold at least one term with a weight above 0")
        if self.temperature.mode != "fixed":
            if "random_sampling" in terms:
                raise ValueError("random_sampling cannot train a temperature: set temperature.mode to fixed")
            if not any(terms[name].weight > 0 for name in TEMPERED if name in terms):
                raise ValueError(
                    f"temperature.mode {self.temperature.mode} needs a loss with a temperature "
                    f"({', '.join(TEMPERED)}) and a weight above 0"
                )
        return self

    @model_validator(mode="after")
    def _balance_has_its_terms(self):
        terms, mode = self.losses.present(), self.balance.mode
        if mode != "none" and len(terms) < 2:
            raise ValueError(f"balance.mode {mode} needs two or more losses: set it to none")
        if mode in ("gradient_norm", "project_kd") and "ce" not in terms:
            raise ValueError(f"balance.mode {mode} compares the losses with ce: give ce a weight")
        silent = [name for name, term in terms.items() if term.weight == 0.0]
        if mode == "gradnorm" and silent:
            raise ValueError(
                f"balance.mode gradnorm compares each loss with its value at balance.start, and the weight of "
                f"{silent[0]} is 0: drop the loss"
            )
        ramped = sorted(name for name, term in terms.items() if term.ramp is not None)
        if mode in SETS_SIZES and ramped:
            raise ValueError(
                f"balance.mode {mode} sets the size of each gradient, so the ramp of {', '.join(ramped)} would be "
                "undone: drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _targets_suffice(self):
        names = set(self.losses.present())
        if self.targets == "topk" and (beyond := sorted(names - {"ce", "tail_bucket_kl"})):
            raise ValueError(
                f"targets topk serve ce and tail_bucket_kl alone, not {', '.join(beyond)}: set targets to hidden"
            )
        if self.targets == "topk" and self.temperature.scope != "global":
            raise ValueError(
                f"temperature.scope {self.temperature.scope} reads the teacher's states, which targets topk do not "
                "hold: set targets to hidden"
            )
        bucket = self.losses.tail_bucket_kl
        if self.targets == "topk" and (bucket is None or bucket.k < FEWEST_KEPT):
            raise ValueError(
                f"targets topk need the loss tail_bucket_kl, whose k they keep, with a k of {FEWEST_KEPT} or more: set "
                "targets to hidden"
            )
        low, high = TEMPERATURES_KEPT
        outside = [value for value in self._temperatures() if not low <= value <= high]
        if self.targets == "topk" and outside:
            raise ValueError(
                f"targets topk serve temperatures from {low:g} to {high:g}, and temperature or curriculum.temperatures "
                f"can go to {outside[0]:g}: move these, or set targets to hidden"
            )
        if self.targets == "hidden" and (beyond := sorted(names & set(PROJECTION_TERMS))):
            raise ValueError(
                f"targets hidden hold no attention projections, which {', '.join(beyond)} needs: set targets to online"
            )
        return self

    def _temperatures(self) -> list[float]:
        """Between which T can lie in the course of a run."""
        temperature, curriculum = self.temperature, self.curriculum
        if temperature.mode != "fixed":
            return [temperature.low, temperature.high]
        if curriculum is not None and curriculum.temperatures is not None:
            return list(curriculum.temperatures)
        return [temperature.init, *([] if temperature.ramp is None else [temperature.ramp.start])]

    @model_validator(mode="after")
    def _stages_set_what_nothing_else_does(self):
        curriculum, temperature = self.curriculum, self.temperature
        if curriculum is None:
            return self
        if curriculum.temperatures is not None:
            others = {"ramp": temperature.ramp, "anchor": temperature.anchor}
            if set_too := [name for name, value in others.items() if value is not None]:
                raise ValueError(
                    f"curriculum.temperatures and temperature.{set_too[0]} both say what the temperature goes to: set "
                    "one of the two to null"
                )
            if temperature.mode == "minimised":
                raise ValueError("temperature.mode minimised has no stages: set curriculum.temperatures to null")
            for value in curriculum.temperatures if temperature.mode == "learned" else ():
                if not temperature.low < value < temperature.high:
                    raise ValueError(
                        f"curriculum.temperatures anchor the learned one, and {value:g} does not lie strictly "
                        f"between temperature.low ({temperature.low:g}) and high ({temperature.high:g}): move these"
                    )
        if curriculum.w_kd is not None:
            self._weights_of_stages_fit(curriculum.complement)
        return self

    def _weights_of_stages_fit(self, complement: bool) -> None:
        terms = self.losses.present()
        tempered = [name for name in TEMPERED if name in terms]
        if len(tempered) != 1:
            raise ValueError(
                f"curriculum.w_kd is the weight of one loss with a temperature, and losses has "
                f"{', '.join(tempered) or 'none'}: set w_kd to null, or keep one"
            )
        if complement and "ce" not in terms:
            raise ValueError("curriculum.complement gives ce the weight 1 - w_kd: add ce, or set complement to false")
        for name in (*tempered, "ce") if complement else tempered:
            if terms[name].ramp is not None:
                raise ValueError(f"the ramp of {name} and curriculum.w_kd both set its weight: leave one of them out")
        if self.balance.mode in SETS_SIZES:
            raise ValueError(
                f"balance.mode {self.balance.mode} sets the size of each gradient, so curriculum.w_kd would be undone: "
                "drop one of the two"
            )

"""The terms that an objective may have, one class per kind of term, with what each of them can be told."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_serializer, model_validator

from asnn_goose.config.settings import Settings

LayerMap = Literal["uniform", "tinybert", "pkd_skip", "pkd_last", "last"]

ATTENTION_TERMS = ("minilm_attention", "tinybert_attention", "attention_relation")
"""Terms of the literature that compare attention distributions or scores."""


class Ramp(Settings):
    """A value's way from a first one to its own, as a function of the optimiser step: a term's weight, or T."""

    start: NonNegativeFloat
    """Value up to the ramp's beginning."""
    begin: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the run at which the ramp begins."""
    end: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the run from which on the value is its own."""
    shape: Literal["linear", "cosine"] = "linear"
    """Way between the two."""

    @model_validator(mode="after")
    def _ordered(self):
        if not self.begin < self.end:
            raise ValueError(f"a ramp must begin ({self.begin}) before it ends ({self.end})")
        return self


class Term(Settings):
    """A named term of the objective."""

    weight: NonNegativeFloat
    """Factor of the raw, token-mean value."""
    ramp: Ramp | None = None
    """How the weight gets there; None: it is the same from the first step on."""


class JensenShannon(Term):
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The teacher's share of the mixture."""


class SkewKL(Term):
    skew: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the other distribution in the mixture; 0 is the plain KL."""
    reverse: bool = False
    """KL(q || mixture) instead of KL(p || mixture)."""


class TopKDivergence(Term):
    k: PositiveInt = 256
    """The teacher's best tokens that are kept."""


class RandomSampling(Term):
    samples: PositiveInt = 50
    """Tokens drawn from the teacher per position, with replacement."""
    power: PositiveFloat = 1.0
    """They are drawn in proportion to p^power; the weights make up for it."""


class DualHead(Term):
    tau: PositiveFloat = 2.0
    """Softness of the log-cosh distance between the logits."""
    centred: bool = True
    """Take each row's mean from its logits first, so that a constant added to them does not count."""


class StateTerm(Term):
    """Of hidden states."""

    skip_first: bool = True
    """Leave out each window's first token, whose state is an outlier in most language models."""


class LayerTerm(StateTerm):
    """Of states of several layers; the value is the mean over the pairs of layers."""

    layers: LayerMap = "uniform"
    """Which teacher layer each student layer is compared with."""


class Hidden(LayerTerm):
    measure: Literal["normalised_mse", "channel_mse", "mse", "pkd", "cosine"] = "normalised_mse"
    """How two states are compared."""
    projector: Literal["linear", "linear_norm", "mlp", "none"] = "linear"
    """What brings the student's states to the teacher's width, in training only."""
    aggregate: bool = False
    """Compare with a running mixture, at a fixed weight of 1/2, of the teacher's layers since the one mapped before;
    the same as without where both have as many layers."""


class CKA(LayerTerm):
    debiased: bool = True
    """Estimate with expectation 0 for independent states; needs 4 tokens."""
    parts: PositiveInt = 1
    """Pieces of a micro-batch whose numerators and denominators are averaged before the ratio."""


class Dynamics(Term):
    layers: PositiveInt = 4
    """Layers that are read out, evenly spaced, the last one among them."""


class Pooled(StateTerm):
    """Of the last layer's states, averaged over segments of a window: one row per segment."""

    segment: PositiveInt = 32
    """Tokens per segment."""


class Contrastive(Pooled):
    sharpness: PositiveFloat = 0.1
    """tau that divides the cosines of the InfoNCE term."""


class Relation(Term):
    layer: PositiveInt | None = None
    """Teacher layer whose projections are related; the student's is its last. None: the teacher's last."""
    heads: PositiveInt = 12
    """Relation heads; divides both models' projections."""
    block: PositiveInt | None = None
    """Tokens are related within blocks of so many; None: within the whole window."""


class Losses(Settings):
    """The objective: the sum over its terms of weight times raw value. A term is absent (null) or configured."""

    ce: Term | None = None
    """Cross-entropy with the text's own next token; has no temperature."""
    forward_kl: Term | None = None
    """T^2 KL(teacher || student)."""
    reverse_kl: Term | None = None
    """T^2 KL(student || teacher)."""
    jensen_shannon: JensenShannon | None = None
    """T^2 times the generalised Jensen-Shannon divergence."""
    skew_kl: SkewKL | None = None
    """T^2 KL against a mixture of both."""
    adaptive_kl: Term | None = None
    """Forward and reverse KL, weighted by where the two differ."""
    total_variation: Term | None = None
    """T times the total variation."""
    tail_bucket_kl: TopKDivergence | None = None
    """T^2 KL over the teacher's k best tokens and one bucket for the rest."""
    tcs: TopKDivergence | None = None
    """T^2 KL over the teacher's k best tokens, both sides renormalised on them; biased."""
    random_sampling: RandomSampling | None = None
    """Cross-entropy against tokens drawn from the teacher, at temperature 1."""
    dual_head: DualHead | None = None
    """Log-cosh distance of an auxiliary head's logits to the teacher's."""
    hidden: Hidden | None = None
    """Distance between projected hidden states."""
    cka: CKA | None = None
    """1 - linear CKA of hidden states."""
    fdd_trajectory: Dynamics | None = None
    """KL between what the layers' states predict."""
    fdd_derivative: Dynamics | None = None
    """1 - cosine of how that changes from layer to layer."""
    raw_dynamics: Dynamics | None = None
    """1 - CKA of the raw states' changes from layer to layer."""
    rkd_distance: Pooled | None = None
    """Distances between pooled states."""
    rkd_angle: Pooled | None = None
    """Angles between pooled states."""
    contrastive: Contrastive | None = None
    """InfoNCE between pooled states."""
    value_relation: Relation | None = None
    """KL between relations of values."""
    qkv_relation: Relation | None = None
    """The same for query, key and value; the student's receptance stands for the query."""

    @model_validator(mode="before")
    @classmethod
    def _no_attention(cls, given: Any):
        for name in given if isinstance(given, dict) else ():
            if name in ATTENTION_TERMS:
                raise ValueError(
                    f"{name} compares attention matrices, and an RWKV student has none: use value_relation or "
                    "qkv_relation"
                )
        return given

    @model_serializer(mode="wrap")
    def _only_present(self, handler):
        return {name: term for name, term in handler(self).items() if term is not None}

    def present(self) -> dict[str, Term]:
        """Name -> term of those that are configured."""
        return {name: term for name in type(self).model_fields if (term := getattr(self, name)) is not None}


LOGIT_TERMS = (
    "ce", "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "adaptive_kl", "total_variation", "tail_bucket_kl",
    "tcs",
)  # fmt: skip
"""Terms of the logits of the two heads, which one fused operation computes."""
TEMPERED = LOGIT_TERMS[1:]
"""Terms with a temperature."""
PROJECTION_TERMS = ("value_relation", "qkv_relation")
"""Terms of the teacher's attention projections, which no store keeps."""
BIASED = {
    "tcs": "tcs renormalises both sides over the k best tokens, so mass that the student puts elsewhere costs nothing",
}
"""Terms whose optimum is not the teacher's distribution, with the reason."""
CUT = ("tail_bucket_kl", "tcs")
"""Divergences over the teacher's best tokens alone."""

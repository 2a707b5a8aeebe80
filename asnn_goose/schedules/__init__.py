"""Schedules, the curriculum and what orders it, early stopping, and the learnable temperature."""

from typing import TYPE_CHECKING, Any

from asnn_goose.schedules.curriculum import (
    POCL_STAGES,
    ByPatience,
    ByPlateau,
    ByTime,
    Curriculum,
    Stage,
    stage_at,
    stage_order,
    stage_sizes,
)
from asnn_goose.schedules.difficulty import rouge_l, rrf_difficulty, rrf_scores
from asnn_goose.schedules.stopping import EarlyStopping, earliest_stop
from asnn_goose.schedules.weights import ramp, warmup_cosine

if TYPE_CHECKING:
    from asnn_goose.schedules.temperature import (
        InstanceTemperature,
        LearnableTemperature,
        MinimisedTemperature,
        anchor_penalty,
        cosine_lambda,
        normalised_states,
        reverse_gradient,
    )

__all__ = [
    "POCL_STAGES",
    "ByPatience",
    "ByPlateau",
    "ByTime",
    "Curriculum",
    "EarlyStopping",
    "InstanceTemperature",
    "LearnableTemperature",
    "MinimisedTemperature",
    "Stage",
    "anchor_penalty",
    "cosine_lambda",
    "earliest_stop",
    "normalised_states",
    "ramp",
    "reverse_gradient",
    "rouge_l",
    "rrf_difficulty",
    "rrf_scores",
    "stage_at",
    "stage_order",
    "stage_sizes",
    "warmup_cosine",
]


def __getattr__(name: str) -> Any:
    # The temperatures alone need torch, for which a dry run, which draws the other schedules, does not wait.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from asnn_goose.schedules import temperature

    return getattr(temperature, name)

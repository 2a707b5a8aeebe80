"""Schedules, the curriculum and what orders it, early stopping, and the learnable temperature."""

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
from asnn_goose.schedules.temperature import LearnableTemperature, anchor_penalty, cosine_lambda, reverse_gradient
from asnn_goose.schedules.weights import ramp, warmup_cosine

__all__ = [
    "POCL_STAGES",
    "ByPatience",
    "ByPlateau",
    "ByTime",
    "Curriculum",
    "EarlyStopping",
    "LearnableTemperature",
    "Stage",
    "anchor_penalty",
    "cosine_lambda",
    "earliest_stop",
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

"""Schedules and the learnable temperature."""

from asnn_goose.schedules.temperature import LearnableTemperature, anchor_penalty, cosine_lambda, reverse_gradient
from asnn_goose.schedules.weights import warmup_cosine

__all__ = ["LearnableTemperature", "anchor_penalty", "cosine_lambda", "reverse_gradient", "warmup_cosine"]

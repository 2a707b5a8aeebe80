"""Losses of distillation. Each takes logits or states and returns a scalar, the mean over unmasked tokens."""

from asnn_goose.losses.cka import linear_cka
from asnn_goose.losses.combine import combine
from asnn_goose.losses.divergence import (
    adaptive_kl,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    total_variation,
)
from asnn_goose.losses.layer_map import layer_map
from asnn_goose.losses.sparse import draw_targets, random_sampling_ce, tail_bucket_kl, tcs

__all__ = [
    "adaptive_kl",
    "combine",
    "cross_entropy",
    "draw_targets",
    "forward_kl",
    "jensen_shannon",
    "layer_map",
    "linear_cka",
    "random_sampling_ce",
    "reverse_kl",
    "skew_kl",
    "tail_bucket_kl",
    "tcs",
    "total_variation",
]

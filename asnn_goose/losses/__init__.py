"""Losses of distillation. Each takes logits and returns a scalar, the mean over unmasked tokens."""

from asnn_goose.losses.combine import combine
from asnn_goose.losses.divergence import cross_entropy, forward_kl

__all__ = ["combine", "cross_entropy", "forward_kl"]

"""Sums over tokens whose rows are as wide as the vocabulary, a tile of tokens at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 128
"""Tokens whose vocabulary-sized rows exist at a time; they are computed again in the backward pass."""


def tiled_sum(formula: Callable[..., Tensor], *per_token: Tensor) -> Tensor:
    """The sum over tiles of ``formula(*tile)``, itself a sum over the tile's tokens; 0 with a graph for no tokens.

    Args:
        formula: takes a tile of each of ``per_token``; its result may have any shape. It must not draw random numbers.
        per_token: [N, ...] each.
    """
    tokens = per_token[0].shape[0]
    # One empty tile gives the shape and the graph where there are no tokens.
    starts = range(0, max(tokens, 1), TILE)
    tiles = [tuple(x[start : start + TILE] for x in per_token) for start in starts]
    return torch.stack([checkpoint(formula, *tile, use_reentrant=False) for tile in tiles]).sum(0)  # pyright: ignore[reportArgumentType]

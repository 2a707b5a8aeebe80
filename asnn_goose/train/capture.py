"""The store of teacher targets for training windows, filled by running the teacher over what is not there yet.

Shapes: B windows, L tokens, N tokens of a tile, E teacher channels, V vocabulary, X bytes of a token.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from asnn_goose.data import topk_codec
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.data.window_targets import WindowTargets, layer_name
from asnn_goose.models import Teacher

TILE = 128
"""Tokens whose logits exist at a time."""


def capture(
    teacher: Teacher,
    shard: TokenShard,
    window: int,
    upcoming: Iterable[int],
    *,
    kind: Literal["hidden", "topk"],
    layers: Sequence[int] = (),
    k: int | None = None,
    batch: int = 8,
    watch: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> WindowTargets:
    """A store that holds the targets of all ``upcoming`` windows.

    Args:
        teacher: runs once over each batch that lacks anything, whatever it lacks.
        shard, window: text, and length of a window in tokens.
        upcoming: numbers of windows in the order in which they will be read, as of ``TrainingWindows.upcoming``.
        kind: hidden keeps the last states and the residual stream at ``layers``, rounded to bfloat16; topk the ``k``
            best tokens and the tail, as of :mod:`asnn_goose.data.topk_codec`.
        batch: windows per pass of the teacher.
        watch: wraps the loop over the batches, to show progress.

    Raises:
        UserError: no room on the disk, found before the teacher runs; a layer that the teacher has not got.
    """
    if (kind == "topk") != (k is not None) or (kind == "topk" and layers):
        raise ValueError(f"kind {kind!r} with k = {k} and layers {tuple(layers)}: topk takes a k, hidden takes layers")
    store = WindowTargets(
        teacher.fingerprint,
        str(teacher.dtype),
        shard,
        window,
        hidden_size=teacher.hidden_size,
        vocab_size=teacher.vocab_size,
        final=kind == "hidden",
        layers=layers,
        k=k,
    )

    def compute(input_ids: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
        ids = input_ids.to(teacher.model.device)
        lacking = tuple(layer for layer in layers if layer_name(layer) in names)
        last_BLE, residual = teacher.states_and_layers(ids, lacking)
        if k is not None:
            return dict.fromkeys(names, _topk_rows(last_BLE, teacher.head_VE, k))
        found = {"final": last_BLE} | {layer_name(layer): states for layer, states in residual.items()}
        return {name: found[name].to("cpu", torch.bfloat16) for name in names}

    store.fill(upcoming, compute, batch, watch)
    return store


@torch.no_grad()
def _topk_rows(last_BLE: Tensor, head_VE: Tensor, k: int) -> Tensor:
    """Rows of the codec [B, L, X] on the CPU, a tile of logits at a time."""
    tiles = [topk_codec.encode(tile_NE @ head_VE.T, k).cpu() for tile_NE in last_BLE.flatten(0, 1).split(TILE)]
    return torch.cat(tiles).unflatten(0, last_BLE.shape[:2])

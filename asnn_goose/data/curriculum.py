"""Batches of training windows in stages: each stage reads a subset of its own, over and over until the next one begins.

Shape suffixes: B windows of a batch, W windows in all, N windows of the curriculum, L tokens of a window.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from asnn_goose.data.loader import Batch
from asnn_goose.data.tokenize import TokenShard

Arrange = Callable[[Sequence[int], int, int], np.ndarray]
"""(windows, easy first; stage; epoch within it) -> the windows of this epoch in the order of reading."""


class CurriculumWindows(Iterator[Batch]):
    """Endless batches of windows of the packed training text, those of the present stage.

    A stage's epochs in a row are one sequence, which begins anew with the stage. Batch i of a stage is its windows
    [i B, (i + 1) B), and rank r of R reads the batches r, r + R, r + 2R, ...

    The state is a position in the stage's sequence, the same for every rank, how far earlier stages were read, and the
    order itself: a run that goes on must not depend on the difficulties coming out to the same last bit.

    Args:
        shard, window: text, and length of a window in tokens; window w is tokens [w window, (w + 1) window).
        batch_size: windows of a batch.
        order: numbers of the windows, easy first.
        arrange: which of them an epoch of a stage reads; a pure function.
        rank, world_size: of this process, and processes in all.
    """

    def __init__(
        self,
        shard: TokenShard,
        window: int,
        batch_size: int,
        order: Sequence[int],
        arrange: Arrange,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        self.order = list(order)
        self._tokens_WL = shard.windows(window)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._epoch = lru_cache(maxsize=4)(lambda stage, epoch: arrange(self.order, stage, epoch))
        self.stage = 0
        self._read = {0: 0}

    def enter(self, stage: int) -> None:
        """Read a later stage from here on, 0-based, from its first epoch's beginning.

        Raises:
            ValueError: the stage is not a later one.
        """
        if stage <= self.stage:
            raise ValueError(f"stage {self.stage} is followed by a later one, not by {stage}")
        self.stage, self._read[stage] = stage, 0

    def __next__(self) -> Batch:
        first = self._read[self.stage] + self._rank * self._batch_size
        rows = [self._window_at(i) for i in range(first, first + self._batch_size)]
        self._read[self.stage] += self._world_size * self._batch_size
        input_ids = self.tokens(rows)
        return Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool), torch.tensor(rows))

    def seen(self) -> list[int]:
        """The windows that all ranks together have read so far, each once, in the order of their first reading."""
        seen: dict[int, None] = {}
        for stage, count in self._read.items():
            # A stage's first epoch already holds all that it has.
            seen |= dict.fromkeys(self._epoch(stage, 0)[:count].tolist())
        return list(seen)

    def tokens(self, windows: Sequence[int]) -> torch.Tensor:
        """Tokens of some windows by number, int64 [B, L]."""
        return torch.from_numpy(self._tokens_WL[list(windows)].astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Stage, and epoch and index within it of the next window that rank 0 reads; what lies behind; the order."""
        epoch, index = divmod(self._read[self.stage], self._size())
        before = {stage: count for stage, count in self._read.items() if stage != self.stage}
        return {"stage": self.stage, "epoch": epoch, "index": index, "read_before": before, "order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at ``state``; every rank takes the same one."""
        self.order, self.stage = list(state["order"]), state["stage"]
        self._epoch.cache_clear()
        self._read = state["read_before"] | {self.stage: state["epoch"] * self._size() + state["index"]}

    def _size(self) -> int:
        return len(self._epoch(self.stage, 0))

    def _window_at(self, position: int) -> int:
        epoch, index = divmod(position, self._size())
        return int(self._epoch(self.stage, epoch)[index])

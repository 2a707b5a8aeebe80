"""Batches of token windows: an endless shuffled stream to train on, a fixed set to evaluate on.

Shape suffixes: B windows of a batch, W windows in all, L tokens of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from asnn_goose.data.tokenize import TokenShard
from asnn_goose.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Windows of tokens. ``logits_BLV[:, :-1]`` predict ``input_ids[:, 1:]``, valid where ``mask[:, 1:]``."""

    input_ids: Tensor
    """int64 [B, L]; 0 on padding, which stands on the right."""
    mask: Tensor
    """bool [B, L]: True on tokens of the text."""
    windows: Tensor | None = None
    """int64 [B]: each window's number in the shard, counted in windows from its start; None in an evaluation set."""


class TrainingWindows(Iterator[Batch]):
    """Endless batches of windows of the packed training text.

    The shard's tokens, documents one behind the other, are cut into windows of ``window`` tokens; a shorter rest is
    left out. Each epoch reads all windows once, in an order drawn from (seed, epoch). The order of the windows depends
    on the seed alone: the epochs in a row are one sequence, batch i is its windows [i B, (i + 1) B), and rank r of R
    reads the batches r, r + R, r + 2R, ...

    The whole state is a position in that sequence, the same for every rank: a run that goes on from it with another
    batch size or number of processes reads each window where the first one would have.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(self, shard: TokenShard, window: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        self.windows = len(shard.tokens) // window
        if self.windows == 0:
            raise UserError(
                f"the training text has {len(shard.tokens)} tokens, less than one window of {window}: "
                "lower data.window or give more text"
            )
        self._tokens_WL = shard.windows(window)
        self._batch_size, self._seed, self._rank, self._world_size = batch_size, seed, rank, world_size
        self._epoch, self._index = 0, 0

    def __next__(self) -> Batch:
        position = self._epoch * self.windows + self._index
        first = position + self._rank * self._batch_size
        rows = [self._window_at(i) for i in range(first, first + self._batch_size)]
        self._epoch, self._index = divmod(position + self._world_size * self._batch_size, self.windows)
        input_ids = torch.from_numpy(self._tokens_WL[rows].astype(np.int64))
        return Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool), torch.tensor(rows))

    def upcoming(self, count: int) -> list[int]:
        """The windows among the next ``count`` of the sequence, over all ranks: each once, in the order of reading."""
        position = self._epoch * self.windows + self._index
        # From within an epoch, all windows come up before the end of the next one.
        last = position + min(count, 2 * self.windows)
        return list(dict.fromkeys(map(self._window_at, range(position, last))))

    def state_dict(self) -> dict[str, int]:
        """Epoch, and index within it, of the next window that rank 0 reads."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at ``state``; every rank takes the same one."""
        self._epoch, self._index = state["epoch"], state["index"]

    def _window_at(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        return int(_epoch_order(self._seed, epoch, self.windows)[index])


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(windows)


@dataclass(frozen=True)
class EvaluationSet:
    """Windows with a fixed budget of tokens, and what a model is asked to predict in them."""

    batches: tuple[Batch, ...]
    predicted_tokens: int
    """Tokens of the text that are not the first of their window; end-of-text tokens are among them."""
    predicted_bytes: int
    """UTF-8 bytes of text that the predicted tokens cover, for bits per byte."""
    documents_W: np.ndarray
    """int64: number of the document that each window is of."""


def evaluation_windows(shard: TokenShard, window: int, budget_tokens: int, batch_size: int) -> EvaluationSet:
    """The first ``budget_tokens`` tokens of the split, documents in the order of the shard (an order by hash).

    Each document is cut at the multiples of ``window`` tokens from its start, so no window crosses documents. A shorter
    window is padded on the right; a window of a single token, which has nothing to predict, is left out. The last
    window is cut so that the tokens of all windows add up to the budget, or to one token less where the cut would leave
    a single one; a split with less is taken whole.

    Raises:
        UserError: no document has two tokens.
        ValueError: a budget below two tokens.
    """
    if budget_tokens < 2:
        raise ValueError(f"budget_tokens is {budget_tokens}, and the least that has a token to predict is 2")
    spans: list[tuple[int, int]] = []
    documents: list[int] = []
    left = budget_tokens
    for document, start, end in _document_windows(shard, window):
        end = min(end, start + left)
        if end - start < 2:
            break
        spans.append((start, end))
        documents.append(document)
        left -= end - start
    if not spans:
        raise UserError("the evaluation text holds no document of two tokens or more: give longer documents")
    input_ids_WL = torch.zeros(len(spans), window, dtype=torch.int64)
    mask_WL = torch.zeros(len(spans), window, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        input_ids_WL[row, : end - start] = torch.from_numpy(shard.tokens[start:end].astype(np.int64))
        mask_WL[row, : end - start] = True
    return EvaluationSet(
        batches=tuple(map(Batch, input_ids_WL.split(batch_size), mask_WL.split(batch_size))),
        predicted_tokens=sum(end - start - 1 for start, end in spans),
        predicted_bytes=sum(int(shard.token_bytes[start + 1 : end].sum(dtype=np.int64)) for start, end in spans),
        documents_W=np.array(documents, dtype=np.int64),
    )


def _document_windows(shard: TokenShard, window: int) -> Iterator[tuple[int, int, int]]:
    """(number of the document, first token, end) of each window."""
    for document, (begin, finish) in enumerate(pairwise(shard.starts.tolist())):
        for start in range(begin, finish, window):
            end = min(start + window, finish)
            if end - start >= 2:
                yield document, start, end

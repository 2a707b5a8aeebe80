"""Labelled texts as padded batches of tokens: a shuffled, endless stream to train on, and a fixed pass to evaluate.

Shape suffixes: N texts of a split, B texts of a batch, L tokens of a batch's longest text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asnn_goose.data.classification import Example
from asnn_goose.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 32
"""Batches whose texts are sorted by length together: one then holds little padding, and its make-up stays random."""


class LabelledBatch(NamedTuple):
    """Texts of one batch."""

    input_ids: Tensor
    """int64 [B, L]; padding stands on the right."""
    mask: Tensor
    """bool [B, L]: True on tokens of the text."""
    labels: Tensor
    """int64 [B]."""
    rows: Tensor
    """int64 [B]: each text's number in its split, the same whatever tokenizer cut it."""


@dataclass(frozen=True)
class LabelledTexts:
    """One split, as one tokenizer cuts it."""

    ids: tuple[np.ndarray, ...]
    """int64, one array per text: its first tokens, with the special ones that the tokenizer adds."""
    labels_N: np.ndarray
    """int64."""
    truncated: int
    """Texts of which something was cut off."""
    pad: int
    """Id on padding."""

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each text."""
        return np.array([len(ids) for ids in self.ids])

    def batch(self, rows: Sequence[int]) -> LabelledBatch:
        """These texts, padded to the longest of them."""
        length = max(len(self.ids[row]) for row in rows)
        input_ids = np.full((len(rows), length), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=bool)
        for place, row in enumerate(rows):
            ids = self.ids[row]
            input_ids[place, : len(ids)], mask[place, : len(ids)] = ids, True
        return LabelledBatch(*map(torch.from_numpy, (input_ids, mask, self.labels_N[rows], np.array(rows))))

    def batches(self, size: int) -> list[LabelledBatch]:
        """Every text once, texts of about one length together."""
        order = np.argsort(self.lengths_N, kind="stable").tolist()
        return [self.batch(order[i : i + size]) for i in range(0, len(order), size)]


def tokenise_texts(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", window: int) -> LabelledTexts:
    """The first ``window`` tokens of each text, special ones included.

    Raises:
        UserError: a window that is longer than the model behind the tokenizer reads; a tokenizer without fast form.
    """
    if window > tokenizer.model_max_length:
        raise UserError(
            f"task.window is {window}, and the model of tokenizer {tokenizer.name_or_path!r} reads "
            f"{tokenizer.model_max_length} tokens at most: lower task.window"
        )
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no fast form: use a model with tokenizer.json")
    texts = [example.text for example in examples]
    encodings = tokenizer(texts, truncation=True, max_length=window).encodings
    assert encodings is not None, "a fast tokenizer gives its encodings"
    # Padded places are masked out everywhere, so any id of the vocabulary serves.
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    return LabelledTexts(
        ids=tuple(np.array(encoding.ids, dtype=np.int64) for encoding in encodings),
        labels_N=np.array([example.label for example in examples], dtype=np.int64),
        truncated=sum(bool(encoding.overflowing) for encoding in encodings),
        pad=pad,
    )


class TrainingTexts(Iterator[LabelledBatch]):
    """Endless batches of a split. Each epoch reads every text once, in an order drawn from (seed, epoch).

    The epoch's order is cut into pools of POOL batches; within one the texts are sorted by length and cut into
    batches, which are shuffled. Where batch_size does not divide the number of texts, one batch of the last pool holds
    the rest, its longest texts. The whole state is a number of batches.
    """

    def __init__(self, texts: LabelledTexts, batch_size: int, seed: int):
        self._texts, self._batch_size, self._seed = texts, batch_size, seed
        self._lengths = tuple(texts.lengths_N.tolist())
        self.batches_per_epoch = -(-len(texts.ids) // batch_size)
        self._position = 0

    def __next__(self) -> LabelledBatch:
        epoch, index = divmod(self._position, self.batches_per_epoch)
        self._position += 1
        return self._texts.batch(_epoch_batches(self._lengths, self._batch_size, self._seed, epoch)[index])

    def state_dict(self) -> dict[str, int]:
        """Batches read so far."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at ``state``."""
        self._position = state["position"]


@lru_cache(maxsize=2)
def _epoch_batches(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = draw.permutation(len(lengths)).tolist()
    batches = []
    for first in range(0, len(order), POOL * batch_size):
        pool = sorted(order[first : first + POOL * batch_size], key=lengths.__getitem__)
        cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        batches += [cut[i] for i in draw.permutation(len(cut))]
    return batches

"""Text without labels, cut as an encoder reads it: pieces with special tokens at both ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from asnn_goose.data.corpora import Document
from asnn_goose.data.labelled_texts import LabelledTexts
from asnn_goose.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 64


def pieces(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", window: int, tokens: int
) -> LabelledTexts:
    """Pieces of the documents, in their order, until they hold ``tokens`` tokens or the text ends; all labels are 0.

    A document is cut every ``window`` tokens, special ones included, so that its last piece may be shorter.

    Raises:
        UserError: a window longer than the model behind the tokenizer reads.
    """
    if window > tokenizer.model_max_length:
        raise UserError(
            f"general.window is {window}, and the model of tokenizer {tokenizer.name_or_path!r} reads "
            f"{tokenizer.model_max_length} tokens at most: lower general.window"
        )
    ids: list[np.ndarray] = []
    count = 0
    for first in range(0, len(documents), DOCUMENTS_PER_CALL):
        if count >= tokens:
            break
        texts = [document.text for document in documents[first : first + DOCUMENTS_PER_CALL]]
        cut = tokenizer(texts, truncation=True, max_length=window, return_overflowing_tokens=True).encodings
        assert cut is not None, "a fast tokenizer gives its encodings"
        for piece in cut:
            if count >= tokens:
                break
            ids.append(np.array(piece.ids, dtype=np.int64))
            count += len(piece.ids)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    return LabelledTexts(tuple(ids), np.zeros(len(ids), dtype=np.int64), truncated=0, pad=pad)

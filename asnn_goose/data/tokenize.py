"""Documents to tokens, once: memory-mapped shards in the cache, keyed by the text, the tokenizer and the splits.

Shape suffixes: N tokens of a split, D documents of a split.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from asnn_goose.cache import is_whole, locked, replacing, seal
from asnn_goose.data.corpora import Corpus, Document
from asnn_goose.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 1
"""Enters the key of a shard; one more whenever its content or layout changes."""
DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class TokenShard:
    """The tokens of one split: its documents in the order given, each closed by one end-of-text token."""

    tokens: np.ndarray
    """uint16 or uint32 [N], memory-mapped."""
    starts: np.ndarray
    """int64 [D + 1]: document i is tokens[starts[i]:starts[i + 1]], its end-of-text token included."""
    key: str
    """Hexadecimal sha256 of what the shard was made from."""
    token_bytes: np.ndarray
    """uint16 [N], memory-mapped: UTF-8 bytes of text that each token covers, 0 for end-of-text; a document's add up to
    its text's."""

    @property
    def starts_digest(self) -> str:
        """Hexadecimal sha256 of ``starts``, which tells apart the splits of one text: they share its key."""
        return hashlib.sha256(np.ascontiguousarray(self.starts).tobytes()).hexdigest()

    def windows(self, window: int) -> np.ndarray:
        """[W, L]: row w holds tokens [w L, (w + 1) L), L = ``window``; a shorter rest is left out."""
        return self.tokens[: len(self.tokens) // window * window].reshape(-1, window)


def tokenise(
    corpus: Corpus, splits: Mapping[str, Sequence[Document]], tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> dict[str, TokenShard]:
    """The shards of ``splits`` in ``folder``; tokenised where they are not there or damaged, else only mapped.

    No special token is added but ``tokenizer.eos_token_id`` behind each document, and text that spells a special token
    is read as plain text.

    Raises:
        UserError: a tokenizer without fast form or end-of-text token; a token that covers more bytes than uint16
            counts; a full disk.
    """
    backend, eos = _plain_backend(tokenizer)
    key = _key(corpus, splits, backend, eos)
    target = folder / key
    with locked(target):
        if not is_whole(target):
            logger.info("tokenising corpus %s, %d documents (once)", corpus.name, sum(map(len, splits.values())))
            with replacing(target) as part:
                for name, documents in splits.items():
                    (part / name).mkdir(parents=True)
                    for field, values in _encode_split(documents, backend, eos).items():
                        # Not into the file itself: of a full disk numpy tells without the system's number.
                        npy = io.BytesIO()
                        np.save(npy, values)
                        (part / name / f"{field}.npy").write_bytes(npy.getbuffer())
                seal(part, corpus=corpus.name, licence=corpus.licence)
    return {name: TokenShard(key=key, **_map(target / name)) for name in splits}


def _plain_backend(tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokenizer, int]:
    """A copy of the fast tokenizer, and the id of its end-of-text token.

    The copy neither truncates, nor pads, nor reads special tokens out of plain text.
    """
    from transformers import PreTrainedTokenizerFast

    name = tokenizer.name_or_path
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {name!r} has no fast form (tokenizer.json): use a teacher that has one")
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(f"the tokenizer {name!r} has no end-of-text token: set its eos_token and save it")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend, eos


def _key(corpus: Corpus, splits: Mapping[str, Sequence[Document]], backend: Tokenizer, eos: int) -> str:
    members = {name: [document.id for document in documents] for name, documents in splits.items()}
    parts = json.dumps([FORMAT, corpus.key, members, backend.to_str(), eos])
    return hashlib.sha256(parts.encode()).hexdigest()


def _map(folder: Path) -> dict[str, np.ndarray]:
    mapped = {field: np.load(folder / f"{field}.npy", mmap_mode="r") for field in ("tokens", "token_bytes")}
    return mapped | {"starts": np.load(folder / "starts.npy")}


def _encode_split(documents: Sequence[Document], backend: Tokenizer, eos: int) -> dict[str, np.ndarray]:
    dtype = np.uint16 if max(*backend.get_vocab().values(), eos) < 2**16 else np.uint32
    pieces = _byte_lengths(backend)
    tokens, token_bytes = [], []
    most = np.iinfo(np.uint16).max
    for document, ids, covered in _encoded(documents, backend, pieces):
        if covered.max(initial=0) > most:
            raise UserError(
                f"the document that begins {document.text[:40]!r} has a word or blank space of {covered.max():,} bytes "
                f"that the tokenizer reads as one token, and {most:,} are counted at most: break it up or drop the "
                "document"
            )
        tokens.append(np.append(ids, eos).astype(dtype))
        token_bytes.append(np.append(covered, 0).astype(np.uint16))
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return {
        "tokens": np.concatenate(tokens),
        "token_bytes": np.concatenate(token_bytes),
        "starts": starts,
    }


def _encoded(
    documents: Sequence[Document], backend: Tokenizer, pieces: np.ndarray | None
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Documents with their token ids and the bytes that each token covers.

    Counted from the tokens' own bytes where those add up to the text (byte-level BPE without a normaliser), else from
    the offsets.
    """
    for first in range(0, len(documents), DOCUMENTS_PER_CALL):
        batch = documents[first : first + DOCUMENTS_PER_CALL]
        texts = [document.text for document in batch]
        for document, encoding in zip(batch, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            if pieces is not None and pieces[ids].sum() == len(document.text.encode()):
                yield document, ids, pieces[ids]
            else:
                yield document, ids, _bytes_by_offsets(document.text, backend)


def _byte_lengths(backend: Tokenizer) -> np.ndarray | None:
    """int64 [V]: bytes of each token where the tokenizer spells bytes in GPT-2's alphabet of 256 letters, else None."""
    if "ByteLevel" not in json.dumps(json.loads(backend.to_str())["decoder"]):
        return None
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token, index in vocabulary.items():
        spelt_in_bytes = token not in added and letters.issuperset(token)
        lengths[index] = len(token) if spelt_in_bytes else len(token.encode())
    return lengths


def _bytes_by_offsets(text: str, backend: Tokenizer) -> np.ndarray:
    """Bytes per token from character offsets: each covers what lies between the ends of its predecessors and its own.

    A character whose bytes are spread over several tokens counts for the first of them; what no token covers (space
    that a normaliser drops at the end) counts for the last. So a document's bytes always add up.
    """
    offsets = backend.encode(text, add_special_tokens=False).offsets
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    byte_at = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    return np.diff(byte_at[ends], prepend=0)

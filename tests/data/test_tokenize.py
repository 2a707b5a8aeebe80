"""Shards: the tokens of the tokenizer itself, exact byte counts, and a cache that notices damage."""

import json
import logging
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from asnn_goose.data.corpora import Corpus, Document
from asnn_goose.data.tokenize import TokenShard, tokenise
from asnn_goose.errors import UserError

TEXTS = ("the cat sat on the mat, the cat", "naïve 日本語 café ½", "say <end> or not <end>", "  two  spaces\n\n")


def _byte_level(normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def _characters() -> PreTrainedTokenizerFast:
    """Pieces of characters with byte fallback and a leading space: counted from offsets."""
    pieces = ["<end>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def _shards(folder, tokenizer, **splits: tuple[str, ...]) -> dict[str, TokenShard]:
    named = {name: tuple(Document(f"{i:016x}", text) for i, text in enumerate(texts)) for name, texts in splits.items()}
    return tokenise(Corpus("tests", "key", "none", ()), named, tokenizer, folder)


def _documents(values: np.ndarray, shard: TokenShard) -> list[list[int]]:
    return [part.tolist() for part in np.split(values, shard.starts[1:-1])]


def test_documents_are_the_tokenizers_tokens_and_one_end(tmp_path):
    tokenizer = _byte_level()
    shards = _shards(tmp_path, tokenizer, train=TEXTS[:2], test=TEXTS[3:])
    for name, texts in (("train", TEXTS[:2]), ("test", TEXTS[3:])):
        expected = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
        assert _documents(shards[name].tokens, shards[name]) == expected
        covered = [sum(counts) for counts in _documents(shards[name].token_bytes, shards[name])]
        assert covered == [len(text.encode()) for text in texts]
    assert shards["train"].tokens.dtype == np.uint16
    assert isinstance(shards["train"].tokens, np.memmap)


def test_a_special_token_in_the_text_is_text(tmp_path):
    tokenizer = _byte_level()
    shard = _shards(tmp_path, tokenizer, train=TEXTS[2:3])["train"]
    assert shard.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(shard.tokens[:-1].tolist()) == TEXTS[2]


def test_a_tokenizer_that_truncates_and_pads_gives_whole_documents(tmp_path):
    plain, cutting = _byte_level(), _byte_level()
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=64)
    shards = [_shards(tmp_path, tokenizer, train=TEXTS)["train"] for tokenizer in (plain, cutting)]
    assert max(map(len, _documents(shards[0].tokens, shards[0]))) > 5
    for field in ("tokens", "token_bytes", "starts"):
        np.testing.assert_array_equal(getattr(shards[1], field), getattr(shards[0], field))


def test_bytes_of_byte_level_tokens_are_those_they_spell(tmp_path):
    tokenizer = _byte_level()
    shard = _shards(tmp_path, tokenizer, train=TEXTS)["train"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}  # GPT-2's alphabet: printable bytes stand for themselves,
    byte_of |= {
        chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)
    }  # others follow
    for text, ids, counts in zip(
        TEXTS, _documents(shard.tokens, shard), _documents(shard.token_bytes, shard), strict=True
    ):
        pieces = [bytes(byte_of[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids[:-1])]
        assert b"".join(pieces) == text.encode()
        assert counts == [*map(len, pieces), 0]


def test_bytes_from_offsets_cover_what_stands_between_tokens(tmp_path):
    shard = _shards(tmp_path, _characters(), train=("ab c", "  aéb  "))["train"]
    # Leading space goes to the first token, both byte pieces of é to its first, trailing space to the last one.
    assert _documents(shard.token_bytes, shard) == [[1, 1, 1, 1, 0], [3, 2, 0, 3, 0]]


@settings(max_examples=100)
@given(st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=3), st.integers(0, 2))
def test_bytes_of_a_documents_tokens_add_up_to_its_own(tmp_path_factory, texts, kind):
    # NFKC changes the number of bytes, so that the tokens' own would not add up.
    tokenizer = (_BYTE_LEVEL, _NORMALISED, _CHARACTERS)[kind]
    shard = _shards(tmp_path_factory.mktemp("shards"), tokenizer, train=tuple(texts))["train"]
    sums = [sum(document) for document in _documents(shard.token_bytes, shard)]
    assert sums == [len(text.encode()) for text in texts]


_BYTE_LEVEL, _NORMALISED, _CHARACTERS = _byte_level(), _byte_level(normalizers.NFKC()), _characters()


def test_a_second_call_only_maps(tmp_path, caplog):
    tokenizer = _byte_level()
    with caplog.at_level(logging.INFO):
        first = _shards(tmp_path, tokenizer, train=TEXTS)["train"]
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
        second = _shards(tmp_path, tokenizer, train=TEXTS)["train"]
    assert caplog.text.count("tokenising") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == written
    assert first.key == second.key
    np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_made_anew(tmp_path, damage, caplog):
    tokenizer = _byte_level()
    expected = _shards(tmp_path, tokenizer, train=TEXTS)["train"].tokens.tolist()
    (victim,) = tmp_path.rglob("tokens.npy")
    if damage == "truncate":
        os.truncate(victim, victim.stat().st_size - 2)
    elif damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    assert _shards(tmp_path, tokenizer, train=TEXTS)["train"].tokens.tolist() == expected
    assert "made anew" in caplog.text


def test_key_follows_text_split_and_tokenizer(tmp_path):
    def key(tokenizer, corpus_key="key", **splits):
        named = {name: tuple(Document(f"{ord(t):016x}", t) for t in texts) for name, texts in splits.items()}
        return tokenise(Corpus("tests", corpus_key, "none", ()), named, tokenizer, tmp_path)["train"].key

    keys = [
        key(_BYTE_LEVEL, train="ab", test="c"),
        key(_BYTE_LEVEL, train="a", test="bc"),
        key(_BYTE_LEVEL, "other text", train="ab", test="c"),
        key(_CHARACTERS, train="ab", test="c"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(_byte_level(), train="ab", test="c") == keys[0]


def test_large_vocabularies_get_four_bytes_a_token(tmp_path):
    vocabulary = {f"w{i}": i for i in range(2**16 + 1)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), eos_token="w1"
    )
    shard = _shards(tmp_path, tokenizer, train=(f"w{2**16}",))["train"]
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens.tolist() == [2**16, 1]


@pytest.mark.parametrize("length", [2**16 - 1, 2**16])
def test_a_token_of_more_bytes_than_uint16_counts_is_refused(tmp_path, length):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "<end>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    text = "q" * length + " a"
    if length < 2**16:
        shard = _shards(tmp_path, tokenizer, train=(text,))["train"]
        assert shard.token_bytes.tolist() == [length, 2, 0]
    else:
        with pytest.raises(UserError, match=r"begins 'q{40}' has a word .* of 65,536 bytes .* 65,535 .*: break it up"):
            _shards(tmp_path, tokenizer, train=(text,))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    backend = Tokenizer.from_str(json.dumps(json.loads(_BYTE_LEVEL.backend_tokenizer.to_str())))
    with pytest.raises(UserError, match="no end-of-text token: set its eos_token"):
        _shards(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend), train=("a",))

"""Documents cut for an encoder: nothing is lost between pieces, and the budget of tokens ends them."""

import pytest

from asnn_goose.data.corpora import Document
from asnn_goose.data.unlabelled_texts import pieces
from asnn_goose.errors import UserError
from tests.conftest import bytes_tokenizer

TEXTS = ["abcdefghij", "k", "lmnopq" * 30]


@pytest.fixture
def tokenizer():
    tokenizer = bytes_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = "<eos>", 64
    return tokenizer


def _documents() -> list[Document]:
    return [Document(str(number), text) for number, text in enumerate(TEXTS)]


def test_pieces_in_their_order_are_the_documents(tokenizer):
    found = pieces(_documents(), tokenizer, 8, 10**6)
    assert tokenizer.decode([token for ids in found.ids for token in ids]) == "".join(TEXTS)
    assert [len(ids) for ids in found.ids[:3]] == [8, 2, 1] and found.lengths_N.max() == 8
    assert not found.labels_N.any() and found.truncated == 0


@pytest.mark.parametrize("tokens", [1, 8, 9, 50])
def test_the_last_piece_is_the_one_that_fills_the_budget(tokenizer, tokens):
    lengths = pieces(_documents(), tokenizer, 8, tokens).lengths_N
    assert lengths[:-1].sum() < tokens <= lengths.sum()


def test_a_window_that_the_model_cannot_read_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"general\.window is 65.*reads 64 tokens at most"):
        pieces(_documents(), tokenizer, 65, 100)

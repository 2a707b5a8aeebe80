"""Documents cut for an encoder: nothing is lost between pieces, and the budget of tokens ends them."""

import pytest

from asnn_goose.data import unlabelled_texts
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


def test_no_document_behind_the_budget_is_tokenised(tokenizer, monkeypatch):
    monkeypatch.setattr(unlabelled_texts, "DOCUMENTS_PER_CALL", 2)
    taken = []

    class Watched(list):
        def __getitem__(self, index):
            taken.extend(found := super().__getitem__(index))
            return found

    # Ten tokens a document: the third fills the budget, and the call that reads it takes the fourth as well.
    documents = [Document(str(number), "abcdefghij") for number in range(12)]
    assert pieces(Watched(documents), tokenizer, 16, 30).lengths_N.tolist() == [10, 10, 10]
    assert taken == documents[:4]


def test_a_window_that_the_model_cannot_read_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"general\.window is 65.*reads 64 tokens at most"):
        pieces(_documents(), tokenizer, 65, 100)

"""Labelled texts as batches: what is cut, what is padded, and that every epoch reads each text once."""

import numpy as np
import pytest
import torch

from asnn_goose.data.classification import Example
from asnn_goose.data.labelled_texts import POOL, LabelledTexts, TrainingTexts, tokenise_texts
from asnn_goose.errors import UserError
from tests.conftest import bytes_tokenizer


def _texts(lengths: list[int]) -> LabelledTexts:
    """Text n is n repeated, so that its number can be read in its tokens."""
    ids = tuple(np.full(length, row, dtype=np.int64) for row, length in enumerate(lengths))
    return LabelledTexts(ids, np.arange(len(lengths)) % 3, 0, 999)


def _encoder_tokenizer():
    """Bytes between a first and a last special token, as a BERT's."""
    from tokenizers import processors

    tokenizer = bytes_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = 64
    return tokenizer


def test_a_longer_text_is_cut_within_its_special_tokens_and_counted():
    tokenizer = _encoder_tokenizer()
    examples = [Example("abcdef", 1), Example("abcdefg", 0), Example("x" * 50, 2)]
    texts = tokenise_texts(examples, tokenizer, 8)
    eos, plain = tokenizer.eos_token_id, bytes_tokenizer()
    assert [ids.tolist() for ids in texts.ids] == [
        [eos, *plain("abcdef").input_ids, eos],
        [eos, *plain("abcdef").input_ids, eos],
        [eos, *plain("xxxxxx").input_ids, eos],
    ]
    assert texts.truncated == 2
    assert texts.labels_N.tolist() == [1, 0, 2]
    assert texts.pad == eos


def test_a_window_beyond_the_models_is_one_sentence():
    with pytest.raises(
        UserError, match=r"task\.window is 65, and the model of tokenizer .* reads 64 tokens at most: lower"
    ):
        tokenise_texts([Example("a", 0)], _encoder_tokenizer(), 65)


def test_a_batch_is_padded_on_the_right_to_its_longest_text():
    batch = _texts([2, 5, 1, 3]).batch([3, 0, 2])
    assert batch.input_ids.tolist() == [[3, 3, 3], [0, 0, 999], [2, 999, 999]]
    assert batch.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert batch.labels.tolist() == [0, 0, 2]
    assert batch.rows.tolist() == [3, 0, 2]


def test_an_evaluation_reads_every_text_once_by_length():
    batches = _texts([4, 1, 3, 1, 2]).batches(2)
    assert [batch.rows.tolist() for batch in batches] == [[1, 3], [4, 2], [0]]


def test_an_epoch_reads_every_text_once_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(1, 40, 1000).tolist()
    stream = TrainingTexts(_texts(lengths), 8, seed=3)
    assert stream.batches_per_epoch == 125
    epochs = [[next(stream) for _ in range(125)] for _ in range(2)]
    for epoch in epochs:
        rows = torch.cat([batch.rows for batch in epoch])
        assert sorted(rows.tolist()) == list(range(1000))
        for batch in epoch:
            assert torch.equal(batch.input_ids[batch.mask].unique(), batch.rows.sort().values)
        padded = sum((~batch.mask).sum() for batch in epoch) / sum(batch.mask.numel() for batch in epoch)
        # Batches drawn without regard to length would be padded to about 40 tokens for 20 of text.
        assert padded < 0.1
    assert not torch.equal(epochs[0][0].rows, epochs[1][0].rows)
    again, other = TrainingTexts(_texts(lengths), 8, seed=3), TrainingTexts(_texts(lengths), 8, seed=4)
    assert torch.equal(next(again).rows, epochs[0][0].rows)
    assert not torch.equal(next(other).rows, epochs[0][0].rows)


def test_batches_of_a_pool_do_not_come_by_length():
    lengths = list(range(1, 8 * POOL + 1))
    stream = TrainingTexts(_texts(lengths), 8, seed=0)
    first = [int(next(stream).rows.min()) for _ in range(POOL)]
    assert sorted(first) == list(range(0, 8 * POOL, 8))
    assert first != sorted(first)


def test_the_stream_goes_on_where_it_was():
    stream, other = (TrainingTexts(_texts([3, 1, 4, 1, 5, 9, 2]), 2, seed=0) for _ in range(2))
    for _ in range(5):
        next(stream)
    other.load_state_dict(stream.state_dict())
    assert all(torch.equal(next(stream).rows, next(other).rows) for _ in range(6))


def test_small_last_batch_belongs_to_its_epoch():
    stream = TrainingTexts(_texts([1] * 7), 3, seed=0)
    sizes = [len(next(stream).rows) for _ in range(6)]
    assert sorted(sizes[:3]) == sorted(sizes[3:]) == [1, 3, 3]

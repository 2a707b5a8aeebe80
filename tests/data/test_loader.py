"""Windows: the training order is a function of the seed alone, the evaluation set of its budget alone."""

from itertools import groupby
from operator import itemgetter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.data.loader import Batch, TrainingWindows, evaluation_windows
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.errors import UserError


def _shard(*lengths: int) -> TokenShard:
    """Documents of these lengths; token i of the shard is the number i + 1 and covers i % 5 bytes."""
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    count = int(starts[-1])
    token_bytes = (np.arange(count) % 5).astype(np.uint16)
    return TokenShard(
        tokens=np.arange(1, count + 1, dtype=np.uint16),
        starts=starts,
        key="key",
        token_bytes=token_bytes,
    )


def _windows(*batches: Batch) -> list[list[int]]:
    return [row for batch in batches for row in batch.input_ids.tolist()]


def _order(shard: TokenShard, count: int, seed: int) -> list[list[int]]:
    return _windows(*(next(windows) for windows in [TrainingWindows(shard, 3, 1, seed)] for _ in range(count)))


# Training


def test_an_epoch_reads_every_whole_window_once():
    shard = _shard(5, 4, 8)  # 17 tokens: five windows of three, two tokens left over
    windows = TrainingWindows(shard, 3, batch_size=5, seed=0)
    first, second = next(windows), next(windows)
    for epoch in (first, second):
        assert sorted(_windows(epoch)) == [[3 * i + 1, 3 * i + 2, 3 * i + 3] for i in range(5)]
        assert epoch.input_ids.dtype == torch.int64
        assert epoch.mask.dtype == torch.bool and bool(epoch.mask.all())


def test_order_is_numpys_permutation_of_seed_and_epoch():
    windows = TrainingWindows(_shard(300), 3, batch_size=100, seed=7)
    for epoch in range(3):
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, epoch]))).permutation(100)
        assert [row[0] for row in _windows(next(windows))] == (3 * order + 1).tolist()


def test_epochs_and_seeds_differ():
    shard = _shard(300)
    one = _order(shard, 200, seed=0)
    assert one[:100] != one[100:]
    assert one[:100] != _order(shard, 100, seed=1)


@given(
    length=st.integers(3, 60),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 4),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_ranks_and_batches_together_read_the_order_of_the_seed(length, batch_size, world_size, steps, seed):
    shard = _shard(length)
    ranks = [TrainingWindows(shard, 3, batch_size, seed, rank, world_size) for rank in range(world_size)]
    read = _windows(*(next(rank) for _ in range(steps) for rank in ranks))
    assert read == _order(shard, len(read), seed)
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)


@given(
    length=st.integers(3, 60),
    batch_size=st.integers(1, 12),
    steps=st.integers(0, 8),
    seed=st.integers(0, 9),
    other_batch_size=st.integers(1, 12),
)
def test_a_restored_position_reads_on(length, batch_size, steps, seed, other_batch_size):
    shard = _shard(length)
    first = TrainingWindows(shard, 3, batch_size, seed)
    for _ in range(steps):
        next(first)
    state = first.state_dict()
    assert set(state) == {"epoch", "index"}
    resumed = TrainingWindows(shard, 3, other_batch_size, seed)
    resumed.load_state_dict(state)
    read = _windows(*(next(resumed) for _ in range(3)))
    assert read == _order(shard, steps * batch_size + len(read), seed)[steps * batch_size :]


def test_a_batch_says_which_windows_it_holds():
    shard = _shard(40)
    windows = TrainingWindows(shard, 3, batch_size=4, seed=3)
    for _ in range(5):
        batch = next(windows)
        assert batch.windows is not None and batch.windows.dtype == torch.int64
        assert [shard.tokens[3 * w : 3 * w + 3].tolist() for w in batch.windows.tolist()] == _windows(batch)


@given(
    length=st.integers(3, 60),
    before=st.integers(0, 8),
    count=st.integers(0, 100),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_upcoming_windows_are_those_that_all_ranks_then_read(length, before, count, world_size, seed):
    shard = _shard(length)
    ranks = [TrainingWindows(shard, 3, 2, seed, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        for _ in range(before):
            next(rank)
    upcoming = [rank.upcoming(count) for rank in ranks]
    state = ranks[0].state_dict()
    numbers = [next(rank).windows for _ in range(count) for rank in ranks]
    read = [w for batch in numbers if batch is not None for w in batch.tolist()][:count]
    assert all(found == list(dict.fromkeys(read)) for found in upcoming)
    assert set(state) == {"epoch", "index"} and all(0 <= w < length // 3 for w in upcoming[0])


def test_text_shorter_than_a_window_says_what_to_change():
    with pytest.raises(UserError, match=r"5 tokens, less than one window of 6: lower data\.window or give more text"):
        TrainingWindows(_shard(2, 3), 6, 1, 0)


def test_a_rank_outside_the_world_is_an_error():
    with pytest.raises(ValueError, match="rank 2"):
        TrainingWindows(_shard(9), 3, 1, 0, rank=2, world_size=2)


# Evaluation


def test_windows_start_at_documents_and_multiples_and_tails_are_padded():
    result = evaluation_windows(_shard(7, 2, 1, 4), window=3, budget_tokens=1000, batch_size=2)
    assert _windows(*result.batches) == [[1, 2, 3], [4, 5, 6], [8, 9, 0], [11, 12, 13]]
    assert [len(batch.mask) for batch in result.batches] == [2, 2]
    masks = torch.cat([batch.mask for batch in result.batches])
    assert masks.tolist() == [[True] * 3, [True] * 3, [True, True, False], [True] * 3]
    assert result.predicted_tokens == 7
    assert result.predicted_bytes == 1 + 2 + 4 + 0 + 3 + 1 + 2  # of the tokens 2, 3, 5, 6, 9, 12 and 13
    assert result.documents_W.tolist() == [0, 0, 1, 3]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6).filter(lambda lengths: max(lengths) >= 2),
    window=st.integers(2, 8),
    budget=st.integers(2, 100),
    batch_size=st.integers(1, 5),
)
def test_the_first_tokens_of_the_budget_are_read_but_for_a_single_one(lengths, window, budget, batch_size):
    shard = _shard(*lengths)
    documents = np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])
    pieces = [document[i : i + window].tolist() for document in documents for i in range(0, len(document), window)]
    whole = [piece for piece in pieces if len(piece) > 1]
    tokens = [(window, token) for window, piece in enumerate(whole) for token in piece][:budget]
    expected = [[token for _, token in group] for _, group in groupby(tokens, itemgetter(0))]
    result = evaluation_windows(shard, window, budget, batch_size)

    masks = [row for batch in result.batches for row in batch.mask.tolist()]
    read = [row[: sum(mask)] for row, mask in zip(_windows(*result.batches), masks, strict=True)]
    assert all(mask == sorted(mask, reverse=True) and len(mask) == window for mask in masks)
    assert read == [row for row in expected if len(row) > 1]
    predicted = [token for row in read for token in row[1:]]
    assert result.predicted_tokens == len(predicted)
    assert result.predicted_bytes == sum((token - 1) % 5 for token in predicted)
    assert [len(batch.input_ids) for batch in result.batches[:-1]] == [batch_size] * (len(result.batches) - 1)


@pytest.mark.parametrize(("budget", "lengths"), [(4, [4]), (5, [4]), (6, [4, 2]), (9, [4, 4])])
def test_a_budget_that_ends_on_a_windows_first_token_leaves_it_out(budget, lengths):
    result = evaluation_windows(_shard(10), window=4, budget_tokens=budget, batch_size=8)
    assert result.batches[0].mask.sum(1).tolist() == lengths
    assert result.predicted_tokens == sum(lengths) - len(lengths)


def test_a_budget_with_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="budget_tokens is 1"):
        evaluation_windows(_shard(10), 4, 1, 2)


def test_no_document_of_two_tokens_says_what_to_change():
    with pytest.raises(UserError, match="no document of two tokens"):
        evaluation_windows(_shard(1, 1), 4, 10, 2)

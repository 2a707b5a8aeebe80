"""Windows in stages: what each stage reads, against a list that is written out, and going on from anywhere."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asnn_goose.data.curriculum import CurriculumWindows
from asnn_goose.data.loader import Batch
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.schedules import stage_order, stage_sizes

WINDOW = 3
ORDER = [7, 0, 5, 9, 2, 4, 1, 8, 3, 6]
VOLUMES = (0.25, 0.5, 1.0)


def shard(windows: int = 10) -> TokenShard:
    """Token i is the number i; one token more than whole windows."""
    count = windows * WINDOW + 1
    return TokenShard(
        tokens=np.arange(count, dtype=np.uint16),
        starts=np.array([0, count]),
        key="key",
        token_bytes=np.ones(count, dtype=np.uint16),
    )


def arrange(order: Sequence[int], stage: int, epoch: int) -> np.ndarray:
    return stage_order(order, stage_sizes(len(order), VOLUMES)[stage], 5, stage, epoch)


def made(batch_size: int = 2, rank: int = 0, world_size: int = 1, order: Sequence[int] = ORDER) -> CurriculumWindows:
    return CurriculumWindows(shard(), WINDOW, batch_size, order, arrange, rank, world_size)


def numbers(*batches: Batch) -> list[int]:
    return [w for batch in batches if batch.windows is not None for w in batch.windows.tolist()]


def written_out(stage: int, size: int, count: int) -> list[int]:
    """The first windows of a stage by numpy's permutations alone."""
    found: list[int] = []
    epoch = 0
    while len(found) < count:
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, stage, epoch])))
        found += [ORDER[i] for i in draw.permutation(size)]
        epoch += 1
    return found[:count]


def test_each_stage_reads_its_own_permutations_of_the_easiest_windows():
    windows = made()
    for stage, size in enumerate((2, 4, 10)):
        if stage:
            windows.enter(stage)
        # Seven batches of two: epochs of 2 and 4 end between and within batches.
        batches = [next(windows) for _ in range(7)]
        assert numbers(*batches) == written_out(stage, size, 14)
        assert set(numbers(*batches)) == set(ORDER[:size])
        for batch in batches:
            expected = [[WINDOW * w + i for i in range(WINDOW)] for w in numbers(batch)]
            assert batch.input_ids.tolist() == expected
            assert batch.input_ids.dtype == torch.int64 and bool(batch.mask.all())


@given(
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    steps=st.lists(st.integers(0, 6), min_size=3, max_size=3),
)
def test_ranks_together_read_the_sequence_of_one_and_agree_on_the_state(batch_size, world_size, steps):
    ranks = [made(batch_size, rank, world_size) for rank in range(world_size)]
    read = []
    for stage, count in enumerate(steps):
        if stage:
            for rank in ranks:
                rank.enter(stage)
        part = numbers(*(next(rank) for _ in range(count) for rank in ranks))
        assert part == written_out(stage, (2, 4, 10)[stage], len(part))
        read += part
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
    # What was read, each once, in the order of reading.
    assert all(rank.seen() == list(dict.fromkeys(read)) for rank in ranks)


@given(stop=st.integers(0, 11), batch_size=st.integers(1, 5))
def test_a_restored_state_reads_on_also_at_a_switch(stop, batch_size):
    """Switches come before the 4th and the 8th batch; the stop lies at, before and behind them among others."""

    def read_on(windows: CurriculumWindows, first: int, last: int) -> list[int]:
        found = []
        for step in range(first, last):
            if step in (4, 8):
                windows.enter(step // 4)
            found += numbers(next(windows))
        return found

    straight, broken = made(batch_size), made(batch_size)
    everything = read_on(straight, 0, 12)
    before = read_on(broken, 0, stop)
    state = copy.deepcopy(broken.state_dict())
    assert {"stage", "epoch", "index"} <= state.keys()
    # A new one, whose own order came out another way.
    resumed = made(batch_size, order=ORDER[::-1])
    next(resumed)
    resumed.load_state_dict(state)
    assert before + read_on(resumed, stop, 12) == everything
    assert resumed.state_dict() == straight.state_dict() and resumed.seen() == straight.seen()


def test_a_stage_may_be_left_out_and_none_comes_back():
    windows = made()
    next(windows)
    windows.enter(2)
    assert numbers(*(next(windows) for _ in range(5))) == written_out(2, 10, 10)
    for stage in (1, 2):
        with pytest.raises(ValueError, match=f"stage 2 is followed by a later one, not by {stage}"):
            windows.enter(stage)


def test_tokens_of_windows_by_number():
    assert made().tokens([3, 0]).tolist() == [[9, 10, 11], [0, 1, 2]]


def test_a_rank_outside_the_world_is_an_error():
    with pytest.raises(ValueError, match="rank 2"):
        made(rank=2, world_size=2)

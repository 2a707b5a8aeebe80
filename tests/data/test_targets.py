"""The store of teacher states: computed once, made anew when damaged, apart for every other teacher and text."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asnn_goose.data.loader import Batch
from asnn_goose.data.targets import states_key, stored_states
from asnn_goose.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "a cache"))
    return tmp_path / "a cache"


class _Counted:
    """Stands for a teacher: two channels of bfloat16 per token, and how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        # Not contiguous, as a slice of a teacher's states may be.
        return torch.stack([input_ids, input_ids + 0.5, -input_ids], -1).to(torch.bfloat16)[..., :2]


def _batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6)] * (count - 1) + [(2, 6)]
    ids = [torch.randint(100, shape, generator=generator) for shape in shapes]
    return [Batch(x, torch.ones_like(x, dtype=torch.bool)) for x in ids]


def _get(batches: list[Batch], compute: _Counted, watched: list | None = None) -> list[Tensor]:
    def watch(items):
        for item in items:
            if watched is not None:
                watched.append(item)
            yield item

    return stored_states(states_key("teacher", "torch.bfloat16", batches), batches, compute, watch)


def _file(cache: Path) -> Path:
    (path,) = (cache / "targets").glob("*/states.safetensors")
    return path


def test_states_are_computed_once_and_come_back_exactly_and_in_order(cache):
    # More than ten, so that an order of names as text would show.
    batches, compute, watched = _batches(12), _Counted(), []
    first = _get(batches, compute, watched)
    assert compute.calls == 12 and watched == batches
    again = _get(batches, compute, watched)
    assert compute.calls == 12 and len(watched) == 12
    for states, more, batch in zip(first, again, batches, strict=True):
        expected = _Counted()(batch.input_ids)
        assert states.dtype == torch.bfloat16
        assert torch.equal(states, expected) and torch.equal(more, expected)


def test_other_windows_are_stored_apart(cache):
    compute = _Counted()
    _get(_batches(3), compute)
    _get(_batches(2), compute)
    assert compute.calls == 5
    assert len(list((cache / "targets").glob("*/states.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["a byte", "a cut", "a missing file", "a missing manifest"])
def test_a_damaged_store_is_made_anew(cache, damage):
    batches, compute = _batches(), _Counted()
    _get(batches, compute)
    path = _file(cache)
    if damage == "a byte":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "a cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        (path if damage == "a missing file" else path.parent / "manifest.json").unlink()
    found = _get(batches, compute)
    assert compute.calls == 6
    for states, batch in zip(found, batches, strict=True):
        assert torch.equal(states, _Counted()(batch.input_ids))
    _get(batches, compute)
    assert compute.calls == 6


def test_a_teacher_that_fails_leaves_nothing_behind(cache):
    def fail(input_ids):
        raise KeyboardInterrupt

    batches = _batches()
    with pytest.raises(KeyboardInterrupt):
        stored_states(states_key("teacher", "torch.bfloat16", batches), batches, fail, iter)
    assert not list((cache / "targets").glob("*/*"))
    compute = _Counted()
    _get(batches, compute)
    assert compute.calls == 3


def test_a_full_disk_is_one_sentence(cache, monkeypatch):
    def full(_self, _content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"the disk is full while writing .*free some space"):
            _get(_batches(), _Counted())
    assert not list((cache / "targets").glob("*/*"))
    compute = _Counted()
    _get(_batches(), compute)
    assert compute.calls == 3


def test_the_key_holds_everything_that_the_states_depend_on():
    def batches(ids: list[list[int]], mask: list[list[int]] | None = None) -> Batch:
        x = torch.tensor(ids)
        return Batch(x, torch.ones_like(x, dtype=torch.bool) if mask is None else torch.tensor(mask).bool())

    plain = [batches([[1, 2], [3, 4]])]
    keys = [
        states_key("teacher", "torch.bfloat16", plain),
        states_key("another", "torch.bfloat16", plain),
        states_key("teacher", "torch.float32", plain),
        states_key("teacher", "torch.bfloat16", [batches([[1, 2], [3, 5]])]),
        states_key("teacher", "torch.bfloat16", [batches([[1, 2], [3, 4]], [[1, 1], [1, 0]])]),
        # The same tokens in one row, in two batches, and the other way round.
        states_key("teacher", "torch.bfloat16", [batches([[1, 2, 3, 4]])]),
        states_key("teacher", "torch.bfloat16", [batches([[1, 2]]), batches([[3, 4]])]),
        states_key("teacher", "torch.bfloat16", [batches([[3, 4]]), batches([[1, 2]])]),
        states_key("teacher", "torch.bfloat16", []),
    ]
    assert len(set(keys)) == len(keys)
    assert states_key("teacher", "torch.bfloat16", [batches([[1, 2], [3, 4]])]) == keys[0]

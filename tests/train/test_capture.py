"""Capture of teacher targets: what is read is what the teacher says when it is asked directly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asnn_goose.data.loader import TrainingWindows
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.errors import UserError
from asnn_goose.kernels.linear_divergence.tail import NODES
from asnn_goose.models import Teacher
from asnn_goose.train.capture import capture

WINDOW = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shard() -> TokenShard:
    tokens = np.random.default_rng(0).integers(0, 257, 20 * WINDOW).astype(np.uint16)
    return TokenShard(tokens, np.array([0, len(tokens)]), "key", np.ones_like(tokens))


def _ids(shard: TokenShard, windows: list[int]) -> Tensor:
    return torch.from_numpy(shard.tokens.reshape(-1, WINDOW)[windows].astype(np.int64))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows of each pass of a teacher over text; what looks at its head reads four tokens."""
    passes: list[int] = []
    states = Teacher.states

    def count(self: Teacher, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] == WINDOW:
            passes.append(len(input_ids))
        return states(self, input_ids)

    monkeypatch.setattr(Teacher, "states", count)
    return passes


def _assert_rounded(found: Tensor, exact: Tensor) -> None:
    """bfloat16 keeps eight bits; 1e-5: the same sums over a batch of another size."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact.float(), rtol=2**-8, atol=1e-5)


def test_hidden_targets_are_the_teachers_own_to_bfloat16(make_teacher, shard, counted):
    teacher, windows = make_teacher(), [5, 1, 17, 3, 0]
    store = capture(teacher, shard, WINDOW, windows, kind="hidden", layers=(0, 1, 2), batch=2)
    assert counted == [2, 2, 1]
    asked = [3, 17, 3]
    exact = teacher(_ids(shard, asked), (0, 1, 2))
    _assert_rounded(store.final(torch.tensor(asked)), teacher.states(_ids(shard, asked)))
    for layer in (0, 1, 2):
        _assert_rounded(store.layer(layer, torch.tensor(asked)), exact.hidden[layer])
    assert store.bytes_per_token == 4 * 2 * teacher.hidden_size


def test_a_bfloat16_teachers_states_are_kept_exactly(make_teacher, shard):
    teacher = make_teacher()
    teacher.model.to(torch.bfloat16)
    store = capture(teacher, shard, WINDOW, [4, 2], kind="hidden", batch=2)
    assert torch.equal(store.final(torch.tensor([4, 2])), teacher.states(_ids(shard, [4, 2])))


@pytest.mark.parametrize("k", [1, 37, 257])
def test_best_tokens_are_the_teachers_own(make_teacher, shard, k):
    teacher, windows = make_teacher(), [5, 1, 17]
    store = capture(teacher, shard, WINDOW, windows, kind="topk", k=k, batch=2)
    ids, log_p, log_tail = store.topk(torch.tensor(windows))
    exact = teacher(_ids(shard, windows)).logits_BLV.double().log_softmax(-1)
    values = exact.topk(k).values
    # Another product of the same states; the codec's steps of 0.0087 nats and, further down, of 0.45 of the gap.
    torch.testing.assert_close(exact.gather(-1, ids), values, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_p.double(), values, rtol=0, atol=0.02)
    if k < 257:
        rest = exact.scatter(-1, ids, -torch.inf)
        expected = torch.stack([(u * rest).logsumexp(-1) for u in NODES], -1)
        torch.testing.assert_close(log_tail.double(), expected, rtol=0, atol=1e-3)
    assert ids.max() < teacher.vocab_size


def test_another_seed_adds_only_what_is_not_there(make_teacher, shard, counted):
    teacher = make_teacher()
    first, second = (TrainingWindows(shard, WINDOW, 2, seed).upcoming(12) for seed in (0, 1))
    capture(teacher, shard, WINDOW, first, kind="hidden", batch=4)
    assert sum(counted) == 12
    store = capture(teacher, shard, WINDOW, second, kind="hidden", batch=4)
    assert sum(counted) == len({*first, *second}) < 24
    windows = TrainingWindows(shard, WINDOW, 2, seed=1)
    for _ in range(6):
        batch = next(windows)
        assert batch.windows is not None
        _assert_rounded(store.final(batch.windows), teacher.states(batch.input_ids))


def test_layers_asked_for_later_are_added(make_teacher, shard, counted):
    teacher = make_teacher()
    capture(teacher, shard, WINDOW, range(4), kind="hidden", layers=(1,))
    store = capture(teacher, shard, WINDOW, range(4), kind="hidden", layers=(1, 2))
    assert counted == [4, 4]
    _assert_rounded(store.layer(2, torch.arange(4)), teacher(_ids(shard, [0, 1, 2, 3]), (2,)).hidden[2])


def test_other_teachers_dtypes_and_k_are_apart(make_teacher, shard, counted):
    wide, narrow, other = make_teacher(), make_teacher(), make_teacher()
    narrow.model.to(torch.bfloat16)
    other.fingerprint = "another"
    for teacher in (wide, narrow, other):
        capture(teacher, shard, WINDOW, range(3), kind="hidden")
        for k in (2, 3):
            capture(teacher, shard, WINDOW, range(3), kind="topk", k=k)
    assert counted == [3] * 9
    for teacher in (wide, narrow, other):
        store = capture(teacher, shard, WINDOW, range(3), kind="topk", k=3)
        assert store.topk(torch.arange(3))[0].shape == (3, WINDOW, 3)
    assert len(counted) == 9


def test_a_flipped_byte_is_captured_again(make_teacher, shard, counted, cache, caplog):
    teacher = make_teacher()
    capture(teacher, shard, WINDOW, range(6), kind="topk", k=4)
    (path,) = (cache / "targets").rglob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    store = capture(teacher, shard, WINDOW, range(6), kind="topk", k=4)
    assert counted == [6, 6] and "damaged" in caplog.text
    assert path.read_bytes() == content  # the same windows in the same order
    store.topk(torch.arange(6))


def test_a_layer_or_a_combination_that_is_not_there_is_refused(make_teacher, shard, cache):
    teacher = make_teacher()
    with pytest.raises(UserError, match=r"no layer 3: choose 0 .* to 2"):
        capture(teacher, shard, WINDOW, range(2), kind="hidden", layers=(1, 3))
    assert not list((cache / "targets").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "wrong", [{"kind": "topk"}, {"kind": "hidden", "k": 3}, {"kind": "topk", "k": 3, "layers": (1,)}], ids=str
)
def test_options_of_the_other_kind_are_refused(wrong: dict[str, Any], make_teacher, shard):
    with pytest.raises(ValueError, match="topk takes a k, hidden takes layers"):
        capture(make_teacher(), shard, WINDOW, range(2), **wrong)

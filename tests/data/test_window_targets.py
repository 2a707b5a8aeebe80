"""The store of targets for training windows: filled once and in order, whole or made anew, apart for all else."""

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asnn_goose.data import topk_codec, window_targets
from asnn_goose.data.tokenize import TokenShard
from asnn_goose.data.window_targets import WindowTargets
from asnn_goose.errors import UserError

WINDOW, WINDOWS, E, V = 4, 30, 3, 11


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tmp_path / "a cache"))
    monkeypatch.setattr(window_targets, "FILE_WINDOWS", 4)
    return tmp_path / "a cache"


def _shard(starts: Sequence[int] = (0, 122)) -> TokenShard:
    tokens = np.random.default_rng(0).integers(0, V, WINDOWS * WINDOW + 2).astype(np.uint16)
    return TokenShard(tokens, np.array(starts), "key", np.zeros_like(tokens))


def _store(shard: TokenShard | None = None, fingerprint: str = "teacher", dtype: str = "torch.bfloat16", **changes):
    quantities = {"hidden_size": E, "vocab_size": V, "final": True} | changes
    return WindowTargets(fingerprint, dtype, shard or _shard(), quantities.pop("window", WINDOW), **quantities)


def _states(input_ids: Tensor, name: str) -> Tensor:
    shift = {"final": 0.5, "layer-1": 1.5, "layer-2": 2.5}[name]
    return torch.stack([input_ids + shift, -input_ids, input_ids * 2], -1).to(torch.bfloat16)


class _Counted:
    """Stands for a teacher's passes; the windows of each call by name of quantity, and an end after some calls."""

    def __init__(self, calls: int | None = None):
        self.left = calls
        self.asked: list[tuple[int, frozenset[str]]] = []

    def __call__(self, input_ids: Tensor, names: frozenset[str]) -> dict[str, Tensor]:
        if self.left is not None and len(self.asked) == self.left:
            raise KeyboardInterrupt
        self.asked.append((len(input_ids), names))
        return {name: _states(input_ids, name) for name in names}

    @property
    def windows(self) -> int:
        return sum(count for count, _ in self.asked)


def _expected(windows: Sequence[int], name: str = "final") -> Tensor:
    rows = [_shard().tokens[w * WINDOW : (w + 1) * WINDOW] for w in windows]
    return _states(torch.tensor(np.stack(rows).astype(np.int64)), name)


def _files(cache: Path) -> list[Path]:
    return sorted((cache / "targets").rglob("*.safetensors"))


def _flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_windows_come_back_in_any_order(cache):
    store, order = _store(), [7, 3, 29, 0, 12, 5, 1]
    store.fill([*order, 3, 7], compute := _Counted(), batch=2)
    assert [count for count, _ in compute.asked] == [2, 2, 2, 1]
    for asked in ([29, 7, 7, 1], [5], order):
        found = store.final(torch.tensor(asked))
        assert found.dtype == torch.bfloat16 and torch.equal(found, _expected(asked))
    assert len(_files(cache)) == 2  # four windows and three


def test_another_process_finds_what_is_there_and_another_order_adds_only_the_rest():
    _store().fill([7, 3, 29, 0, 12], _Counted(), batch=2)
    again = _store()
    again.fill([12, 3], compute := _Counted(), batch=2)
    assert compute.windows == 0 and torch.equal(again.final(torch.tensor([3])), _expected([3]))
    again.fill([0, 1, 2, 3, 4, 12], compute, batch=2)
    assert [count for count, _ in compute.asked] == [2, 1]
    assert torch.equal(again.final(torch.arange(5)), _expected(range(5)))


def test_a_stopped_capture_goes_on_behind_the_last_file(cache):
    order = list(range(15))
    with pytest.raises(KeyboardInterrupt):
        _store().fill(order, _Counted(calls=5), batch=2)  # ten windows: two files of four, two windows lost
    assert len(_files(cache)) == 2
    store = _store()
    store.fill(order, compute := _Counted(), batch=2)
    assert compute.windows == 7
    assert torch.equal(store.final(torch.tensor(order)), _expected(order))


def test_the_store_that_was_stopped_can_go_on_itself():
    store = _store()
    with pytest.raises(KeyboardInterrupt):
        store.fill(range(9), _Counted(calls=3), batch=2)
    store.fill(range(9), compute := _Counted(), batch=2)
    assert compute.windows == 5 and torch.equal(store.final(torch.arange(9)), _expected(range(9)))


PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from tests.data.test_window_targets import _Counted, _expected, _store
torch.set_num_threads(1)
gate, order = Path(sys.argv[2]), [int(w) for w in sys.argv[3].split(",")]
counted = _Counted()
def slow(input_ids, names):
    time.sleep(0.02)
    return counted(input_ids, names)
store = _store()
gate.with_suffix("." + sys.argv[4]).touch()
while not gate.exists():
    time.sleep(0.002)
store.fill(order, slow, batch=2)
assert torch.equal(store.final(torch.tensor(order)), _expected(order))
print(counted.windows)
"""


def test_two_processes_at_once_share_the_work(tmp_path, cache):
    orders, root = [list(range(20)), list(range(23, 3, -1))], str(Path(__file__).parents[2])
    gate = tmp_path / "gate"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, root, str(gate), ",".join(map(str, order)), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, order in enumerate(orders)
    ]
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("gate.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    both = len(list(tmp_path.glob("gate.*"))) == 2
    gate.touch()
    computed = [int(process.communicate(timeout=300)[0]) for process in started]
    assert both and [process.returncode for process in started] == [0, 0]
    assert sum(computed) == 24  # each window once
    store = _store()
    store.fill(range(24), compute := _Counted(), batch=4)
    assert compute.windows == 0 and torch.equal(store.final(torch.arange(24)), _expected(range(24)))


def test_one_pass_fills_every_quantity_that_lacks_a_window():
    _store(layers=(1,)).fill(range(4), _Counted(), batch=4)
    store = _store(layers=(1, 2))
    store.fill(range(6), compute := _Counted(), batch=4)
    assert compute.asked == [(4, {"layer-2"}), (2, {"final", "layer-1", "layer-2"})]
    for layer in (1, 2):
        assert torch.equal(store.layer(layer, torch.arange(6)), _expected(range(6), f"layer-{layer}"))
    assert torch.equal(store.final(torch.arange(6)), _expected(range(6)))


def test_what_is_there_is_not_written_again_beside_what_is_not(cache):
    _store().fill(range(4), _Counted(), batch=4)
    store = _store(layers=(1,))
    store.fill(range(2, 6), _Counted(), batch=4)  # one batch, of which the last two windows lack their final states
    for name, windows in (("final", range(6)), ("layer-1", range(2, 6))):
        held = [load_file(path)["windows"].tolist() for path in _files(cache) if path.parent.name == name]
        assert sorted(chain(*held)) == list(windows)
        assert torch.equal(store.quantities[name].read(torch.tensor(windows[2:])), _expected(windows[2:], name))


@pytest.mark.parametrize("where", ["values", "header", "length", "empty", "gone"])
def test_damage_is_said_and_captured_again(where, cache, caplog):
    _store().fill(range(8), _Counted(), batch=4)
    path = _files(cache)[0]
    if where == "gone":
        path.unlink()
    elif where in ("length", "empty"):
        path.write_bytes(path.read_bytes()[: -3 if where == "length" else 0])
    else:
        _flip(path, -1 if where == "values" else 20)
    store, compute = _store(), _Counted()
    store.fill(range(8), compute, batch=4)
    assert compute.windows == 4
    assert torch.equal(store.final(torch.arange(8)), _expected(range(8)))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (0 if where == "gone" else 1)
    assert all(path.name in record.message and "damaged" in record.message for record in warnings)
    _store().fill(range(8), compute, batch=4)
    assert compute.windows == 4


@pytest.mark.parametrize("position", range(0, 200, 7))
def test_wherever_a_byte_is_flipped_no_window_reads_wrong(position, cache):
    _store().fill(range(4), _Counted(), batch=4)
    (path,) = _files(cache)
    if position < path.stat().st_size:
        _flip(path, position)
    store = _store()
    store.fill(range(4), _Counted(), batch=4)
    assert torch.equal(store.final(torch.arange(4)), _expected(range(4)))


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "another"},
        {"dtype": "torch.float32"},
        {"shard": replace(_shard(), key="another")},
        {"shard": _shard(starts=(0, 60, 122))},  # another split of the text with that key
        {"window": 5},
        {"vocab_size": V + 1},
    ],
)
def test_whatever_the_targets_depend_on_is_stored_apart(change):
    _store().fill(range(4), _Counted(), batch=4)
    _store(**change).fill(range(4), compute := _Counted(), batch=4)
    assert compute.windows == 4
    assert _store(**change).folder != _store().folder
    _store(**change).fill(range(4), compute, batch=4)
    assert compute.windows == 4


def test_best_tokens_of_each_k_are_stored_apart_and_come_back_decoded():
    def logits(input_ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(input_ids, V) * 4.0 + 0.1 * torch.arange(V)

    for k in (2, 3):
        store = _store(final=False, k=k)

        def compute(input_ids, names, k=k):
            assert names == {f"topk-{k}"}
            rows = topk_codec.encode(logits(input_ids).flatten(0, 1), k)
            return dict.fromkeys(names, rows.unflatten(0, input_ids.shape))

        store.fill([5, 2], compute, batch=8)
        ids, log_p, log_tail = store.topk(torch.tensor([2, 5, 2]))
        assert ids.shape == log_p.shape == (3, WINDOW, k) and log_tail.shape == (3, WINDOW, 7)
        tokens = torch.tensor(np.stack([_shard().tokens[w * WINDOW : (w + 1) * WINDOW] for w in (2, 5, 2)]).astype(int))
        exact = logits(tokens).log_softmax(-1).topk(k)
        assert torch.equal(ids, exact.indices)
        torch.testing.assert_close(log_p, exact.values, rtol=0, atol=0.01)  # a step of the codec
        assert store.bytes_per_token == topk_codec.row_bytes(V, k)


def test_no_room_is_one_sentence_before_anything_is_computed(cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * WINDOW * 6 * 8 - 1))
    compute = _Counted()
    with pytest.raises(
        UserError, match=r"final of 8 windows, layer-1 of 8 windows\) need 0\.0 MB .*free: .*ASNN_GOOSE_CACHE.*online"
    ):
        _store(layers=(1,)).fill(range(8), compute, batch=4)
    assert compute.asked == [] and _files(cache) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * WINDOW * 6 * 8))
    _store(layers=(1,)).fill(range(8), compute, batch=4)
    assert compute.windows == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_runs_full_keeps_what_was_written(cache):
    store = _store()

    def fills_up(batches: Sequence[list[int]]) -> Iterable[list[int]]:
        for number, batch in enumerate(batches):
            if number == 2:  # one file is there; the next one goes to a full device
                (store.folder / "final" / ".part").symlink_to("/dev/full")
            yield batch

    with pytest.raises(UserError, match=r"the disk is full while writing .*what was written before is kept"):
        store.fill(range(16), _Counted(), batch=2, watch=fills_up)
    assert len(_files(cache)) == 1 and len(list((store.folder / "final").iterdir())) == 1
    store.fill(range(16), compute := _Counted(), batch=2)
    assert compute.windows == 12
    assert torch.equal(store.final(torch.arange(16)), _expected(range(16)))


def test_what_a_killed_process_left_does_no_harm(cache):
    store = _store()
    (store.folder / "final").mkdir(parents=True)
    (store.folder / "final" / ".part").write_bytes(b"half a file")
    store.fill(range(4), _Counted(), batch=4)
    assert torch.equal(store.final(torch.arange(4)), _expected(range(4)))
    assert list((store.folder / "final").iterdir()) == _files(cache)


def test_a_window_or_a_quantity_that_is_not_there_is_named():
    store = _store()
    store.fill([1, 2], _Counted(), batch=4)
    with pytest.raises(LookupError, match=r"window 3 is not in .*final: capture it before"):
        store.final(torch.tensor([1, 3]))
    with pytest.raises(LookupError, match="opened with final, not layer-2"):
        store.layer(2, torch.tensor([1]))
    with pytest.raises(LookupError, match="no best tokens: open it with a k"):
        store.topk(torch.tensor([1]))


def test_values_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"final takes .*not 3 numbers of torch\.float32"):
        _store().fill([0], lambda ids, names: {"final": _states(ids, "final").float()}, batch=1)


def test_what_is_captured_and_its_size_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="asnn_goose"):
        _store().fill(range(5), _Counted(), batch=4)
        _store().fill(range(5), _Counted(), batch=4)
    (line,) = [record.message for record in caplog.records]
    assert "final of 5 windows, 0.0 MB" in line


def test_many_files_hold_no_file_open(cache):
    store = _store()
    store.fill(range(WINDOWS), _Counted(), batch=4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    again = _store()
    again.fill(range(WINDOWS), _Counted(), batch=4)
    assert len(_files(cache)) == 8 and len(list(Path("/proc/self/fd").iterdir())) == before
    assert torch.equal(again.final(torch.arange(WINDOWS)), _expected(range(WINDOWS)))

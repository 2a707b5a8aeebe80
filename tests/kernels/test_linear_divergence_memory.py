"""What linear_divergence holds at once beside its inputs and gradients, and what a second backward pass finds."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asnn_goose.kernels.linear_divergence import DIVERGENCES, linear_divergence, tiles

V, D, N = 4000, 48, 200
BUDGET = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operations return, until they are freed; views of inputs are none."""

    now = peak = 0

    def __init__(self, *inputs: Tensor):
        super().__init__()
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.seen:
            self.seen.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


def leaves() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    h, W, ht, Wt = (torch.randn(*shape, generator=draw) for shape in ((N, D), (V, D), (N, D), (V, D)))
    return h.requires_grad_(), W.requires_grad_(), ht, Wt, torch.randint(0, V, (N,), generator=draw)


def loss(parts: tuple[Tensor, ...], weights: dict[str, float], T: Tensor, **options: Any) -> Tensor:
    h, W, ht, Wt, targets = parts
    sums, _ = linear_divergence(h, W, ht, Wt, targets_N=targets, weights=weights, temperature=T, **options)
    return torch.stack([weight * sums[name] for name, weight in weights.items()]).sum()


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("names", [*((name,) for name in DIVERGENCES), DIVERGENCES], ids="+".join)
def test_tiles_stay_within_their_budget(names: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch):
    """The logits of all rows would take 3 MiB for each model; a tile may take 1, for any mixture and a learned T."""
    monkeypatch.setattr(tiles, "BUDGET", BUDGET)
    parts, T = leaves(), torch.tensor(1.7, requires_grad=True)
    with LiveBytes(*parts, T) as live:
        loss(parts, dict.fromkeys(names, 0.5), T, backend=backend).backward()
    gradients = (N + V) * D * 4
    # Small change: a tile's states, counts per row.
    assert live.peak <= gradients + BUDGET + 50_000
    assert live.peak > gradients + 0.5 * BUDGET


def test_one_row_is_the_least_a_tile_can_take(monkeypatch: pytest.MonkeyPatch):
    parts, T = leaves(), torch.tensor(1.7)
    wanted = loss(parts, {"reverse_kl": 1.0}, T).item()
    monkeypatch.setattr(tiles, "BUDGET", 1)
    monkeypatch.setattr(tiles, "SHARE", 0)
    assert loss(parts, {"reverse_kl": 1.0}, T).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_a_second_backward_finds_the_same_gradients_in_memory_of_its_own(backend: str):
    h, W, *others = leaves()
    T = torch.tensor(1.7, requires_grad=True)
    total = loss((h, W, *others), {"ce": 1.0, "forward_kl": 0.5}, T, backend=backend)
    first = torch.autograd.grad(total, [h, W, T], retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(3.0 * total, [h, W, T])
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3.0 * b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, [h, W, T])

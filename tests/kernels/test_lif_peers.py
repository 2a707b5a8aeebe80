"""SpikingJelly's and snnTorch's neurons in our place: they spike as ours, and train as ours."""

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.lif import lif, lif_rate
from asnn_goose.kernels.lif.peers import MAPPED


def currents(*shape: int) -> Tensor:
    # Below 1: with a membrane beyond twice the threshold, snnTorch subtracts the second time before it charges.
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95


def spikes_and_gradient(x: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    spikes, v = lif(leaf, kind="binary", threshold=1.0, **options)
    weights = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1))
    ((spikes * weights).sum() + v.sum()).backward()
    assert leaf.grad is not None
    return spikes.detach(), v.detach(), leaf.grad


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("width", [1.0, 0.4])
@pytest.mark.parametrize(
    ("peer", "surrogate", "reset", "detach_reset"),
    [("spikingjelly", s, r, d) for s in MAPPED["spikingjelly"] for r in ("soft", "hard") for d in (True, False)]
    + [("snntorch", s, "soft", False) for s in MAPPED["snntorch"]],
)
def test_a_peer_spikes_and_trains_as_ours(peer, surrogate, reset, detach_reset, width: float, decay: float):
    options = {"reset": reset, "detach_reset": detach_reset, "surrogate": surrogate, "width": width, "decay": decay}
    x = currents(6, 4, 32)
    theirs = spikes_and_gradient(x, backend=peer, **options)
    ours = spikes_and_gradient(x, backend="numba", **options)
    assert torch.equal(theirs[0], ours[0]) and theirs[0].sum() > 20
    # A membrane is a sum of six rounded terms, and the gradient a sum of as many products.
    torch.testing.assert_close(theirs[1], ours[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs[2], ours[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peer", MAPPED)
def test_their_rate_is_the_mean_of_their_spikes(peer: str):
    x = currents(5, 16)
    options = {"kind": "binary", "threshold": 1.0, "decay": 0.5, "detach_reset": False, "backend": peer}
    rate = lif_rate(x, 4, **options)
    assert torch.equal(rate, lif(x.expand(4, -1, -1), **options)[0].mean(0))
    assert 0 < rate.mean() < 1


def test_half_precision_is_charged_in_float32():
    """In bfloat16 a membrane of 31/32 would not grow by 2^-9."""
    current = torch.full((16, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    first = torch.cat([torch.full((1, 1, 1), 31 / 32, dtype=torch.bfloat16), current])
    spikes, v = lif(first, kind="binary", threshold=1.0, decay=1.0, backend="spikingjelly")
    assert spikes.flatten().tolist() == [0.0] * 16 + [1.0]
    assert v.item() == 0.0

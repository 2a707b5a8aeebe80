"""linear_divergence with a temperature for each row, against the same rows one call at a time.

Shapes: N rows, D student channels, E teacher channels, V vocabulary, K kept tokens.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import linear_divergence
from asnn_goose.kernels.linear_divergence.rows import FORMULAS
from asnn_goose.kernels.linear_divergence.tail import NODES, log_tail
from asnn_goose.kernels.linear_divergence.tiles import TILE

N = 7
TEMPERATURES = torch.tensor([1.0, 1.1, 2.0, 4.9, 0.6, 3.0, 1.7], dtype=torch.float64)


def problem(N: int = N, V: int = 11, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, head, teacher hidden, teacher head, targets."""
    draw = torch.Generator().manual_seed(0)
    h, W, ht, Wt = (torch.randn(*s, generator=draw).to(dtype) for s in [(N, 5), (V, 5), (N, 4), (V, 4)])
    return h, W, ht, Wt, torch.randint(0, V, (N,), generator=draw)


def total_and_slopes(parts, weights, T_N: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum, and its gradients in hidden, head and the temperatures."""
    h, W, ht, Wt, targets = parts
    leaves = [x.detach().clone().requires_grad_() for x in (h, W, T_N)]
    sums, _ = linear_divergence(
        leaves[0], leaves[1], ht, Wt, targets_N=targets, weights=weights, temperature=leaves[2], **options
    )
    total = torch.stack([weight * sums[name] for name, weight in weights.items()]).sum()
    return total.detach(), list(torch.autograd.grad(total, leaves))


def row_by_row(parts, weights, T_N: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    h, W, ht, Wt, targets = parts
    found = [
        total_and_slopes((h[n : n + 1], W, ht[n : n + 1], Wt, targets[n : n + 1]), weights, T_N[n], **options)
        for n in range(len(h))
    ]
    states, heads, slopes = zip(*(gradients for _, gradients in found), strict=True)
    return torch.stack([t for t, _ in found]).sum(), [torch.cat(states), torch.stack(heads).sum(0), torch.stack(slopes)]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_each_row_has_its_own(backend: str, name: str):
    weights = {name: 0.7, "ce": 0.3}
    total, gradients = total_and_slopes(problem(), weights, TEMPERATURES, backend=backend)
    wanted, wanted_gradients = row_by_row(problem(), weights, TEMPERATURES, backend="reference")
    torch.testing.assert_close((total, *gradients), (wanted, *wanted_gradients), rtol=1e-11, atol=1e-12)


def test_each_row_has_its_own_in_the_native_form():
    weights = {"forward_kl": 0.7, "ce": 0.3}
    total, gradients = total_and_slopes(problem(dtype=torch.float32), weights, TEMPERATURES, backend="native")
    wanted, wanted_gradients = row_by_row(problem(), weights, TEMPERATURES, backend="reference")
    # Products and softmaxes of numbers of size 1 in float32; a slope is a difference of terms of size T.
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=0.0)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_one_temperature_for_all_is_the_same_for_each(backend: str):
    """Over the edge of a tile."""
    parts, weights = problem(TILE + 3, dtype=torch.float32), {"forward_kl": 1.0}
    shared, gradients = total_and_slopes(parts, weights, torch.tensor(2.3), backend=backend)
    each, each_gradients = total_and_slopes(parts, weights, torch.full((TILE + 3,), 2.3), backend=backend)
    assert torch.equal(shared, each) and torch.equal(gradients[0], each_gradients[0])
    # One float32 rounding of each slope instead of one of their sum.
    assert gradients[2].item() == pytest.approx(each_gradients[2].sum().item(), rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_a_masked_row_takes_its_temperature_along(backend: str):
    h, W, ht, Wt, _ = problem(dtype=torch.float32)
    mask = torch.tensor([True, False, True, True, False, False, True])
    T_N = TEMPERATURES.clone().requires_grad_()
    sums, count = linear_divergence(h, W, ht, Wt, temperature=T_N, mask=mask, backend=backend)
    (slopes,) = torch.autograd.grad(sums["forward_kl"], T_N)
    kept = T_N.detach()[mask].requires_grad_()
    fewer, _ = linear_divergence(h[mask], W, ht[mask], Wt, temperature=kept, backend=backend)
    (wanted,) = torch.autograd.grad(fewer["forward_kl"], kept)
    assert count == 4 and torch.equal(sums["forward_kl"], fewer["forward_kl"])
    assert torch.equal(slopes[mask], wanted) and not slopes[~mask].any()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_each_row_of_a_stored_teacher_has_its_own(backend: str):
    h, W, ht, Wt, _ = problem()
    T_N = TEMPERATURES.clamp_min(1.0).requires_grad_()
    log_p_NV = (ht @ Wt.T).log_softmax(-1)
    log_p_NK, ids_NK = log_p_NV.topk(4, -1)
    rest_NV = log_p_NV.scatter(-1, ids_NK, -torch.inf)
    tails_NJ = torch.stack([(node * rest_NV).logsumexp(-1) for node in NODES], -1)
    weights = {"tail_bucket_kl": 1.0}
    stored = (ids_NK, log_p_NK, tails_NJ)
    sums, _ = linear_divergence(h, W, teacher_topk=stored, weights=weights, temperature=T_N, backend=backend)
    slopes = torch.autograd.grad(sums["tail_bucket_kl"], T_N)[0]
    wanted, options = [], {"tail_bucket_kl": {"k": 4}}
    for n in range(N):
        T = T_N[n].detach().requires_grad_()
        row, _ = linear_divergence(
            h[n : n + 1], W, ht[n : n + 1], Wt, weights=weights, options=options, temperature=T, backend="reference"
        )
        wanted.append((row["tail_bucket_kl"], torch.autograd.grad(row["tail_bucket_kl"], T)[0]))
    # The tail between its nodes is a polynomial: 1e-7 in the value, 1e-6 of it in the slope.
    total = sum(value.item() for value, _ in wanted)
    assert sums["tail_bucket_kl"].item() == pytest.approx(total, rel=1e-6)
    assert slopes.tolist() == pytest.approx([slope.item() for _, slope in wanted], abs=1e-5 * total)


def test_a_row_outside_the_stored_tails_span_is_named():
    with pytest.raises(ValueError, match=r"a stored tail serves temperatures from 1 to 5, not 5\.5"):
        log_tail(torch.zeros(2, len(NODES)), torch.tensor([[2.0], [5.5]]))

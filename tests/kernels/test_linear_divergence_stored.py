"""linear_divergence from a stored teacher, against the bucketed KL of all its logits in float64.

Shapes: N rows, D channels, V vocabulary, K kept tokens, J nodes.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asnn_goose.kernels.linear_divergence import forward_kl_rows, linear_divergence
from asnn_goose.kernels.linear_divergence.rows import stored_bucket_kl_rows, tail_bucket_kl_rows
from asnn_goose.kernels.linear_divergence.tail import NODES

K = 16
MIXTURE = {"ce": 0.3, "tail_bucket_kl": 0.7}


def stored(teacher_NV: Tensor, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, log p, tail at the nodes), token by token from the definition: log of the sum over the tail of p^u."""
    p_NV = teacher_NV.double().softmax(-1)
    order_NV = p_NV.argsort(-1, descending=True)
    ids_NK, rest_NR = order_NV[:, :k], order_NV[:, k:]
    tail_NR = p_NV.gather(-1, rest_NR)
    return ids_NK, p_NV.gather(-1, ids_NK).log(), torch.stack([(tail_NR**u).sum(-1).log() for u in NODES], -1)


def logits(N: int = 5, V: int = 400, size: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) in float64."""
    draw = torch.Generator().manual_seed(seed)
    s, t = (size * torch.randn(N, V, generator=draw, dtype=torch.float64) for _ in range(2))
    return s, t


def with_slope(formula, s: Tensor, T: float) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, gradient on the student, derivative in T) of the rows' sum."""
    leaf, temperature = s.clone().requires_grad_(), torch.tensor(T, dtype=torch.float64, requires_grad=True)
    rows_N = formula(leaf, temperature)
    grad, slope = torch.autograd.grad(rows_N.sum(), [leaf, temperature])
    return rows_N.detach(), grad, slope


def test_the_running_example_by_hand():
    """p = (.5, .25, .125, .0625, .0625) and a uniform student; the two best tokens are kept."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]], dtype=torch.float64).log()
    rows_N, grad, _ = with_slope(
        lambda s, T: stored_bucket_kl_rows(s, *stored(teacher, 2), T), torch.zeros(1, 5, dtype=torch.float64), 1.0
    )
    assert rows_N.item() == pytest.approx(0.295064069427155, rel=1e-12)
    third = 0.35 / 3
    assert grad[0].tolist() == pytest.approx([-0.3, -0.05, third, third, third], rel=1e-9)


@pytest.mark.parametrize("T", [1.0, 1.0 / NODES[2], 1.4, 2.0, 3.1, 4.9, 5.0])
def test_rows_equal_those_of_all_logits(T: float):
    s, t = logits()
    rows_N, grad, slope = with_slope(lambda s, T: stored_bucket_kl_rows(s, *stored(t), T), s, T)
    wanted_N, wanted, wanted_slope = with_slope(lambda s, T: tail_bucket_kl_rows(s, t, T, K), s, T)
    # At its nodes the stored tail is exact; between them the polynomial of degree 6 misses the log-partition of logits
    # of std 1 by 1e-8, and its derivative, most at both ends, by 1e-7.
    at_node = any(math.isclose(1.0 / T, node) for node in NODES)
    torch.testing.assert_close(rows_N, wanted_N, rtol=1e-10 if at_node else 1e-7, atol=0.0)
    assert (grad - wanted).norm() <= (1e-10 if at_node else 1e-7) * wanted.norm()
    up, down = (tail_bucket_kl_rows(s, t, T + d, K).sum().item() for d in (1e-5, -1e-5))
    size = wanted_N.sum().item()
    assert slope.item() == pytest.approx((up - down) / 2e-5, abs=1e-6 * size)
    assert slope.item() == pytest.approx(wanted_slope.item(), abs=1e-6 * size)


def test_kept_tokens_that_are_all_tokens_give_the_full_divergence():
    s, t = logits(V=9)
    parts = stored(t, 9)
    assert parts[2].eq(-torch.inf).all()
    for T in (1.0, 2.5):
        rows_N, grad, slope = with_slope(lambda s, T: stored_bucket_kl_rows(s, *parts, T), s, T)
        wanted_N, wanted, wanted_slope = with_slope(lambda s, T: forward_kl_rows(s, t, T), s, T)
        torch.testing.assert_close((rows_N, grad, slope), (wanted_N, wanted, wanted_slope))


def test_a_teacher_that_bans_all_but_some_kept_tokens():
    s, t = logits(V=30)
    t[:, 4:] = -torch.inf
    parts = stored(t, 6)
    rows_N, grad, slope = with_slope(lambda s, T: stored_bucket_kl_rows(s, *parts, T), s, 2.0)
    wanted_N, wanted, wanted_slope = with_slope(lambda s, T: forward_kl_rows(s, t, T), s, 2.0)
    torch.testing.assert_close((rows_N, grad, slope), (wanted_N, wanted, wanted_slope))


def run(s: Tensor, parts: tuple[Tensor, Tensor, Tensor], T: float = 1.7, dtype=torch.float64, **options: Any):
    """(sums, count, gradients in states, head and T) of MIXTURE with the logits as s = h W^T."""
    N, V = s.shape
    h = torch.eye(N, dtype=dtype).requires_grad_()
    W = s.T.to(dtype).contiguous().requires_grad_()
    temperature = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(N) % V
    sums, count = linear_divergence(
        h, W, teacher_topk=parts, targets_N=targets, weights=MIXTURE, temperature=temperature, **options
    )
    total = torch.stack([weight * sums[name] for name, weight in MIXTURE.items()]).sum()
    return [value.item() for value in sums.values()], count, torch.autograd.grad(total, [h, W, temperature])


def test_tiles_of_a_stored_teacher_equal_all_rows_at_once(monkeypatch: pytest.MonkeyPatch):
    """A budget of three rows a tile, one of them at a time through autograd."""
    from asnn_goose.kernels.linear_divergence import tiles

    s, t = logits(N=7)
    monkeypatch.setattr(tiles, "BUDGET", 3 * 2 * 8 * 400 * 4 // 3)
    monkeypatch.setattr(tiles, "SHARE", 0)
    found, count, grads = run(s, stored(t), backend="tiled")
    wanted, _, wanted_grads = run(s, stored(t), backend="reference")
    exact = tail_bucket_kl_rows(s, t, 1.7, K).sum().item()
    assert count == 7 and found == pytest.approx(wanted, rel=1e-12)
    assert found[1] == pytest.approx(exact, rel=1e-8)
    for a, b in zip(grads, wanted_grads, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_a_stored_teacher_in_float32_and_bfloat16():
    s, t = logits(N=12, V=3000, size=1.5)
    parts = stored(t)
    narrow = parts[0], parts[1].float(), parts[2].float()
    wanted, _, wanted_grads = run(s, parts)
    # Rounding the stored numbers and the logits to 2^-24 of themselves, about 10.
    found, _, grads = run(s, narrow, dtype=torch.float32)
    assert found == pytest.approx(wanted, rel=2e-6)
    assert all((a - b).norm() <= 2e-5 * b.norm() for a, b in zip(grads, wanted_grads, strict=True))
    # A head of bfloat16 rounds the logits by 2^-9 of up to 6.
    found, _, grads = run(s, narrow, dtype=torch.bfloat16)
    assert found == pytest.approx(wanted, rel=0.01)
    assert all((a.double() - b).norm() <= 0.02 * b.norm() for a, b in zip(grads, wanted_grads, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mask_deletes_rows_of_a_stored_teacher(backend: str):
    s, t = logits(N=6)
    mask = torch.tensor([True, False, True, True, False, True])
    ids, log_p, log_tail = stored(t)
    ids, log_p, log_tail = ids.clone(), log_p.clone(), log_tail.clone()
    ids[~mask], log_p[~mask], log_tail[~mask] = -1, math.nan, math.nan
    found, count, grads = run(s, (ids, log_p, log_tail), mask=mask, backend=backend)
    assert count == 4
    assert found[1] == pytest.approx(tail_bucket_kl_rows(s[mask], t[mask], 1.7, K).sum().item(), rel=1e-8)
    assert grads[0][~mask].eq(0).all() and grads[2].isfinite()


def test_ce_alone_needs_nothing_of_the_stored_teacher():
    s, t = logits(N=4)
    h, W, targets = torch.eye(4), s.T.float().contiguous(), torch.arange(4)
    sums, _ = linear_divergence(h, W, teacher_topk=stored(t), targets_N=targets, weights={"ce": 1.0}, backend="native")
    assert sums["ce"].item() == pytest.approx(-s.log_softmax(-1).diagonal().sum().item(), rel=1e-6)

"""Reverse KL, Jensen-Shannon, skew KL, adaptive KL and total variation: printed values, closed gradients, shared laws.

Shapes: B batch, L tokens, N rows, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from softmax_oracle import float64, softmax
from torch import Tensor

from asnn_goose.losses import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    tail_bucket_kl,
    total_variation,
)

P, Q = float64([0.7, 0.2, 0.1]).log(), float64([0.5, 0.3, 0.2]).log()
FAMILY: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": lambda *a, **k: jensen_shannon(*a, beta=0.3, **k),
    "skew_kl": lambda *a, **k: skew_kl(*a, skew=0.2, **k),
    "skew_kl_reverse": lambda *a, **k: skew_kl(*a, skew=0.2, reverse=True, **k),
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "tail_bucket_kl": lambda s, t, mask=None, temperature=1.0: tail_bucket_kl(s, t, 2, mask, temperature),
}


def oracle(name: str, s: np.ndarray, t: np.ndarray, T: float) -> float:
    """One row by the formula in numpy."""
    p, q = softmax(t / T), softmax(s / T)

    def kl(a, b):
        return float((a * (np.log(a) - np.log(b))).sum())

    if name == "forward_kl":
        return T * T * kl(p, q)
    if name == "reverse_kl":
        return T * T * kl(q, p)
    if name == "jensen_shannon":
        m = 0.3 * p + 0.7 * q
        return T * T * (0.3 * kl(p, m) + 0.7 * kl(q, m))
    if name == "skew_kl":
        return T * T * kl(p, 0.2 * p + 0.8 * q)
    if name == "skew_kl_reverse":
        return T * T * kl(q, 0.8 * p + 0.2 * q)
    if name == "total_variation":
        return T * float(np.abs(p - q).sum()) / 2
    order = np.argsort(-p, kind="stable")
    if name == "tail_bucket_kl":
        kept, rest = order[:2], order[2:]
        return T * T * kl(np.append(p[kept], p[rest].sum()), np.append(q[kept], q[rest].sum()))
    tail = np.cumsum(p[order]) > 0.5
    tail[0] = False
    gap = np.abs(p - q)[order]
    head, tail = gap[~tail].sum(), gap[tail].sum()
    return T * T * (head * kl(p, q) + tail * kl(q, p)) / (head + tail)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (lambda: forward_kl(Q, P), 0.0851228259572216),
        (lambda: reverse_kl(Q, P), 0.09203285023383187),
        (lambda: jensen_shannon(Q, P, beta=0.1), 0.0076946876755979),
        (lambda: jensen_shannon(Q, P), 0.0219011789684938),
        (lambda: jensen_shannon(Q, P, beta=0.9), 0.0081847558431383),
        (lambda: jensen_shannon(Q, P, beta=1e-6), 8.512e-08),
        (lambda: skew_kl(Q, P), 0.06957796652381594),
        (lambda: skew_kl(Q, P, reverse=True), 0.07282753345876342),
        (lambda: skew_kl(Q, P, skew=0.0), 0.0851228259572216),
        (lambda: skew_kl(Q, P, skew=0.0, reverse=True), 0.09203285023383187),
        (lambda: skew_kl(Q, P, skew=0.9), 0.001002225),
        (lambda: skew_kl(Q, P, skew=0.9, reverse=True), 0.000818768),
        (lambda: total_variation(Q, P), 0.2),
        (
            lambda: adaptive_kl(float64([0.3, 0.1, 0.3, 0.3]).log(), float64([0.45, 0.3, 0.15, 0.1]).log()),
            0.3043519222896878,
        ),
    ],
)
def test_printed_values(loss: Callable[[], Tensor], value: float):
    digits = len(f"{value:.16g}".split("e")[0].replace("-", "").lstrip("0.").replace(".", ""))
    assert loss().item() == pytest.approx(value, rel=10.0 ** (1 - min(digits, 13)), abs=1e-15)


def test_printed_gradients():
    for loss, gradient in (
        (forward_kl, [-0.2, 0.1, 0.1]),
        (reverse_kl, [-0.2142525434, 0.0940296774, 0.1202228661]),
    ):
        s = Q.clone().requires_grad_()
        loss(s, P).backward()
        assert s.grad is not None
        assert s.grad.tolist() == pytest.approx(gradient, abs=6e-11)


def test_adaptive_kl_has_the_gradient_of_constant_weights():
    draw = torch.Generator().manual_seed(6)
    s, t = torch.randn(6, generator=draw, dtype=torch.float64), 2 * torch.randn(6, generator=draw, dtype=torch.float64)
    T = 1.5
    p, q = softmax(t.numpy() / T), softmax(s.numpy() / T)
    order = np.argsort(-p)
    tail = np.cumsum(p[order]) > 0.5
    tail[0] = False
    gap = np.abs(p - q)[order]
    head, tail = gap[~tail].sum(), gap[tail].sum()
    log_ratio = np.log(q / p)
    wanted = T * (head * (q - p) + tail * q * (log_ratio - (q * log_ratio).sum())) / (head + tail)
    (found,) = torch.autograd.grad(adaptive_kl(s.requires_grad_(), t, temperature=T), s)
    # Differences of float64 probabilities.
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)


def test_adaptive_kls_tail_begins_above_half_of_the_mass():
    """p uniform over four: the running sum is exactly 1/2 at the second token, which is still of the head."""
    p, q = np.full(4, 0.25), np.array([0.05, 0.1, 0.15, 0.7])
    gap = np.abs(p - q)
    forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    wanted = (gap[:2].sum() * forward + gap[2:].sum() * reverse) / gap.sum()
    found = adaptive_kl(torch.from_numpy(np.log(q))[None], torch.zeros(1, 4, dtype=torch.float64))
    assert found.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("faint", [1e-12, 1e-25])
def test_a_faint_probability_keeps_its_share_of_value_and_gradient(faint: float):
    """KL of (1 - e, e) against a fair coin: log 2 + (1 - e) log(1 - e) + e log e."""
    coin = torch.zeros(1, 2, dtype=torch.float64)
    sure = float64([[math.log1p(-faint), math.log(faint)]])
    wanted = math.log(2.0) + (1 - faint) * math.log1p(-faint) + faint * math.log(faint)
    assert forward_kl(coin, sure).item() == pytest.approx(wanted, rel=1e-12)
    value = reverse_kl(sure.requires_grad_(), coin)
    (grad,) = torch.autograd.grad(value, sure)
    assert value.item() == pytest.approx(wanted, rel=1e-12)
    assert grad[0, 1].item() == pytest.approx(faint * (math.log(2.0 * faint) - wanted), rel=1e-12, abs=0.0)


def test_jensen_shannon_divided_by_beta_tends_to_the_forward_kl():
    assert jensen_shannon(Q, P, beta=1e-6).item() / 1e-6 == pytest.approx(0.0851227, abs=1e-7)


def test_disjoint_supports_stay_finite():
    apart = float64([0.0, -torch.inf]), float64([-torch.inf, 0.0])
    assert jensen_shannon(*apart).item() == pytest.approx(math.log(2), rel=1e-14)
    assert skew_kl(*apart).item() == pytest.approx(math.log(10), rel=1e-14)
    assert skew_kl(*apart, reverse=True).item() == pytest.approx(math.log(10), rel=1e-14)
    assert total_variation(*apart).item() == 1.0


rows = hnp.arrays(np.float64, (2, 5), elements=st.floats(-8, 8))


@pytest.mark.parametrize("name", FAMILY)
@given(s=rows, t=rows, T=st.floats(0.5, 6.0))
def test_equals_the_formula_and_is_never_negative(name: str, s: np.ndarray, t: np.ndarray, T: float):
    # Without ties, of which any may be among the k best.
    t = t + np.arange(5) * 1e-3
    value = FAMILY[name](torch.tensor(s), torch.tensor(t), temperature=T).item()
    if name != "adaptive_kl" or np.abs(softmax(t / T) - softmax(s / T)).sum(-1).min() > 1e-9:
        wanted = np.mean([oracle(name, a, b, T) for a, b in zip(s, t, strict=True)])
        assert value == pytest.approx(wanted, rel=1e-8, abs=1e-10)
    assert value >= -1e-12


@pytest.mark.parametrize("name", FAMILY)
def test_gradcheck_in_logits_and_temperature(name: str):
    draw = torch.Generator().manual_seed(3)
    s, t = (torch.randn(3, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    T = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    if name == "adaptive_kl":
        # Head and tail weights are constants of the step by definition: a difference quotient would see them move.
        leaf = s.clone().requires_grad_()
        assert torch.autograd.grad(adaptive_kl(leaf, t), leaf)[0].sum().item() == pytest.approx(0.0, abs=1e-12)
        return
    assert torch.autograd.gradcheck(lambda s, T: FAMILY[name](s, t, temperature=T), (s.requires_grad_(), T))


@pytest.mark.parametrize("name", FAMILY)
def test_laws_shared_by_all(name: str):
    loss = FAMILY[name]
    draw = torch.Generator().manual_seed(4)
    s, t = (torch.randn(2, 7, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    value = loss(s, t, temperature=2.0)
    assert loss(t, t, temperature=2.0).abs() <= 1e-15
    torch.testing.assert_close(loss(s + 3.0, t - 5.0, temperature=2.0), value, rtol=1e-12, atol=0)
    order = torch.randperm(9, generator=draw)
    torch.testing.assert_close(loss(s[..., order], t[..., order], temperature=2.0), value, rtol=1e-12, atol=0)
    # A mask deletes tokens, whatever they hold.
    mask = torch.rand(2, 7, generator=draw) > 0.4
    wanted = loss(s[mask], t[mask], temperature=2.0)
    s[~mask], t[~mask] = torch.nan, torch.nan
    torch.testing.assert_close(loss(s, t, mask, 2.0), wanted)
    empty = loss(s.requires_grad_(), t, torch.zeros_like(mask), 2.0)
    empty.backward()
    assert empty.item() == 0.0
    assert s.grad is not None and s.grad.nan_to_num(nan=7.0).eq(0).all()


@pytest.mark.parametrize("name", FAMILY)
def test_a_banned_token_stays_banned_and_finite(name: str):
    """The teacher gives it no mass; value and gradients are numbers, also where both sides ban it."""
    t = float64([[2.0, -torch.inf, 0.0, 1.0]])
    for student in ([0.5, 1.0, -0.5, 0.0], [0.5, -torch.inf, -0.5, 0.0]):
        s = float64([student]).requires_grad_()
        T = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        loss = FAMILY[name](s, t, temperature=T)
        loss.backward()
        assert s.grad is not None and T.grad is not None
        assert loss.isfinite() and s.grad.isfinite().all() and T.grad.isfinite()


def test_a_reversed_skew_of_0_is_the_reverse_kl_also_where_the_teacher_bans_a_token():
    draw = torch.Generator().manual_seed(7)
    s, t = (torch.randn(2, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    t[:, 2] = -torch.inf
    found = skew_kl(s, t, skew=0.0, reverse=True, temperature=2.0)
    assert found.isfinite() and torch.equal(found, reverse_kl(s, t, temperature=2.0))


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_is_computed_in_float32(name: str):
    draw = torch.Generator().manual_seed(5)
    t = (2 * torch.randn(1, 50_257, generator=draw)).bfloat16()
    s = (t + 0.05 * torch.randn(1, 50_257, generator=draw)).bfloat16()
    narrow = FAMILY[name](s, t)
    assert narrow.dtype == torch.float32 and narrow >= -1e-6
    assert torch.equal(narrow, FAMILY[name](s.float(), t.float()))


def test_squared_temperature_or_one_power_for_the_total_variation():
    for name, loss in FAMILY.items():
        T = 50.0
        scaled: Any = loss(T * Q, T * P, temperature=T)
        power = 1 if name == "total_variation" else 2
        assert scaled.item() == pytest.approx(T**power * loss(Q, P).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jensen_shannon(Q, P, beta=0.0), "beta must lie strictly between 0 and 1, not 0.0: use forward_kl"),
        (lambda: jensen_shannon(Q, P, beta=1.0), "beta must lie strictly between 0 and 1"),
        (lambda: skew_kl(Q, P, skew=1.0), r"skew must lie in \[0, 1\), not 1.0"),
        (lambda: reverse_kl(Q, P[:2]), "must have one shape"),
        (lambda: adaptive_kl(Q, P, temperature=0.0), "temperature must be above 0, not 0"),
        (lambda: total_variation(Q[None], P[None], torch.ones(2)), "must have the logits' leading shape"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call: Callable[[], Tensor], message: str):
    with pytest.raises(ValueError, match=message) as told:
        call()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("T", [0.5, 0.9, 2.0])
def test_a_token_banned_by_the_smallest_number_is_as_banned_as_by_infinity(name: str, T: float):
    """-l / T^2, the derivative of l / T, overflows at T < 1 where l is the least number, and times 0 it is NaN."""
    student, teacher = float64([[0.5, -1.0, 2.0, 0.0, 0.0]]), float64([[1.0, 0.3, -0.7, 0.0, 0.0]])
    found = []
    for least in (torch.finfo(torch.float32).min, -math.inf):
        s, t = student.float(), teacher.float()
        s[:, 3:] = t[:, 3:] = least
        s.requires_grad_()
        temperature = torch.tensor(T, requires_grad=True)
        value = FAMILY[name](s, t, temperature=temperature)
        found.append((value.detach(), *torch.autograd.grad(value, (s, temperature))))
    for smallest, infinite in zip(*found, strict=True):
        assert infinite.isfinite().all()
        torch.testing.assert_close(smallest, infinite, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", FAMILY)
def test_whole_numbers_are_logits_too(name: str):
    s, t = torch.tensor([[2, 0, 1, 3], [0, 0, 3, 1]]), torch.tensor([[3, 2, 1, 0], [1, 0, 0, 2]])
    T = torch.tensor([1, 2])
    assert FAMILY[name](s, t, temperature=T).item() == FAMILY[name](s.float(), t.float(), temperature=T).item()

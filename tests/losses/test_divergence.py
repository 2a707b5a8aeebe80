"""forward_kl and cross_entropy against printed values, numpy float64, gradcheck, and the laws they obey.

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
from softmax_oracle import EXACT, STUDENT, TEACHER, float64, kl, softmax
from torch import Tensor

from asnn_goose.losses import cross_entropy, forward_kl


@pytest.mark.parametrize(
    ("T", "raw", "value", "gradient"),
    [
        (1, 0.2394013611397709, 0.2394013611397709, [-0.3337419954, 0.3018209162, 0.0319210791]),
        (2, 0.05762045105098167, 0.2304818042039267, [-0.3210523925, 0.2740361869, 0.0470162056]),
        (5, 0.008476103979238692, 0.21190259948096732, [-0.2987540669, 0.2452260935, 0.0535279734]),
        (1000, 1.9454008620849e-07, 0.19454008620849, [-0.2778934683, 0.222342571, 0.0555508974]),
    ],
)
def test_values_and_gradients_by_temperature(T: float, raw: float, value: float, gradient: list[float]):
    s = float64(STUDENT).requires_grad_()
    loss = forward_kl(s, float64(TEACHER), temperature=T)
    loss.backward()
    # At T = 1000 KL is 2e-7, the difference of logarithms near 1: 1e-16 of them is 1e-9 of it.
    tolerance = EXACT if T < 1000 else 1e-9
    assert loss.item() == pytest.approx(value, rel=tolerance)
    assert loss.item() / T**2 == pytest.approx(raw, rel=tolerance)
    assert s.grad is not None
    assert s.grad.tolist() == pytest.approx(gradient, abs=6e-11)
    assert s.grad.sum().item() == pytest.approx(0.0, abs=1e-12)


def test_limit_of_a_high_temperature():
    """1/2 Var(d) + (1/2 k3(t,d,d) + 1/6 k3(d,d,d)) / T, cumulants uniform over the vocabulary, d = s - t."""
    t, d = (np.array(x) - np.mean(x) for x in (TEACHER, np.subtract(STUDENT, TEACHER)))
    limit, correction = (d**2).mean() / 2, (t * d * d).mean() / 2 + (d**3).mean() / 6
    assert limit == pytest.approx(0.19444444444444442, rel=EXACT)
    assert correction == pytest.approx(0.09567901234567902, rel=EXACT)
    T = 100.0
    value = forward_kl(float64(STUDENT), float64(TEACHER), temperature=T).item()
    assert T * (value - limit) == pytest.approx(correction, rel=0.02)


def test_squared_temperature_cancels_the_shrinkage():
    values = [forward_kl(float64(STUDENT), float64(TEACHER), temperature=T).item() for T in (1.0, 5.0)]
    assert 0.87 < values[1] / values[0] < 0.89


def test_token_mean_and_not_batchmean_nor_element_mean():
    """batchmean would give 1.316 for L = 3, the mean over elements a quarter of the value."""
    for L in (3, 6):
        t = float64([2.0, 1, 0, -1]).expand(2, L, 4)
        value = forward_kl(torch.zeros_like(t), t).item()
        assert value == pytest.approx(0.43875739714446516, rel=EXACT)


def test_direction_is_from_teacher_to_student():
    p, q = float64([0.7, 0.2, 0.1]).log(), float64([0.5, 0.3, 0.2]).log().requires_grad_()
    loss = forward_kl(q, p)
    assert loss.item() == pytest.approx(0.0851228259572216, rel=EXACT)
    assert forward_kl(p, q.detach()).item() == pytest.approx(0.09203285023383187, rel=EXACT)
    loss.backward()
    assert q.grad is not None
    assert q.grad.tolist() == pytest.approx([-0.2, 0.1, 0.1], rel=1e-13)


def test_gradcheck():
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    mask, targets = (
        torch.tensor([[True, False, True], [True, True, False]]),
        torch.randint(0, 5, (2, 3), generator=draw),
    )
    T = float64(1.7).requires_grad_()
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, T: forward_kl(s, t, mask, T), (s, T))
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, targets, mask), s)


logits_pair = st.integers(2, 8).flatmap(
    lambda V: hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.just(V)), elements=st.floats(-20, 20))
)


@given(pair=logits_pair, T=st.floats(0.5, 5), shifts=st.tuples(st.floats(-99, 99), st.floats(-99, 99)))
def test_laws_of_the_divergence(pair: np.ndarray, T: float, shifts: tuple[float, float]):
    s, t = torch.from_numpy(pair).unbind(0)
    s = s.clone().requires_grad_()
    loss = forward_kl(s, t, temperature=T)
    loss.backward()
    value = loss.item()
    assert value == pytest.approx(T**2 * kl(pair[0], pair[1], T).mean(), rel=1e-9, abs=1e-12)
    assert value >= -1e-12
    assert forward_kl(t, t, temperature=T).item() == 0.0
    assert s.grad is not None
    assert s.grad.sum(-1).abs().max().item() <= 1e-12
    shifted = forward_kl(s + shifts[0], t + shifts[1], temperature=T).item()
    assert shifted == pytest.approx(value, rel=1e-9, abs=1e-11)
    order = torch.arange(s.shape[1]).flip(0)
    assert forward_kl(s[:, order], t[:, order], temperature=T).item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@given(kept=st.lists(st.booleans(), min_size=1, max_size=8), T=st.floats(0.5, 5))
def test_a_mask_deletes_tokens_whatever_they_hold(kept: list[bool], T: float):
    mask = torch.tensor(kept)
    draw = torch.Generator().manual_seed(len(kept))
    s, t = (torch.randn(len(kept), 6, generator=draw, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 6, (len(kept),), generator=draw)
    s[~mask], t[~mask], targets[~mask] = torch.nan, torch.inf, -100
    s.requires_grad_()
    temperature = float64(T).requires_grad_()
    found = forward_kl(s, t, mask, temperature), cross_entropy(s, targets, mask)
    wanted = 0.0, 0.0
    if any(kept):
        wanted = forward_kl(s[mask], t[mask], temperature=T).item(), cross_entropy(s[mask], targets[mask]).item()
    assert [loss.item() for loss in found] == pytest.approx(wanted, rel=1e-12)
    (found[0] + found[1]).backward()
    assert s.grad is not None and temperature.grad is not None
    assert s.grad.isfinite().all() and s.grad[~mask].eq(0).all() and temperature.grad.isfinite()


def test_leading_shapes_are_all_tokens():
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    targets, mask = torch.randint(0, 5, (2, 3, 4), generator=draw), torch.rand(2, 3, 4, generator=draw) < 0.5
    flat = s.flatten(0, 2), t.flatten(0, 2), targets.flatten(), mask.flatten()
    assert forward_kl(s, t, mask).item() == pytest.approx(forward_kl(flat[0], flat[1], flat[3]).item(), rel=EXACT)
    assert cross_entropy(s, targets, mask).item() == pytest.approx(
        cross_entropy(flat[0], flat[2], flat[3]).item(), rel=EXACT
    )
    single = forward_kl(s[0, 0, 0], t[0, 0, 0], mask=torch.tensor(True))
    assert single.item() == pytest.approx(kl(s[0, 0, 0].numpy(), t[0, 0, 0].numpy()), rel=1e-12)
    alone = cross_entropy(s[0, 0, 0], targets[0, 0, 0])
    assert alone.item() == pytest.approx(-math.log(softmax(s[0, 0, 0].numpy())[targets[0, 0, 0]]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened(dtype: torch.dtype):
    """50,257 logits of std 2 and a student 0.05 away: computed in bfloat16 this KL is negative."""
    draw = torch.Generator().manual_seed(0)
    t = 2 * torch.randn(1, 50_257, generator=draw)
    s = (t + 0.05 * torch.randn(1, 50_257, generator=draw)).to(dtype)
    t = t.to(dtype)
    exact = forward_kl(s.double(), t.double()).item()
    value = forward_kl(s, t)
    assert value.dtype == torch.float32
    assert value.item() >= 0.0
    assert value.item() == pytest.approx(exact, rel=0.01)


def test_a_large_logit_keeps_its_gradient():
    """No clamp: at logits of 40 the gradient is still q - p."""
    s = torch.tensor([[40.0, 0.0]], requires_grad=True)
    forward_kl(s, torch.tensor([[0.0, 0.0]])).backward()
    assert s.grad is not None
    assert s.grad.flatten().tolist() == pytest.approx([0.5, -0.5])


def test_teacher_receives_no_gradient():
    t = float64([TEACHER]).requires_grad_()
    s = float64([STUDENT]).requires_grad_()
    forward_kl(s, t).backward()
    assert t.grad is None and s.grad is not None


def test_cross_entropy_by_hand():
    """Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8; the mask is the shifted label mask."""
    logits = float64([1.0, 2.0, 5.0]).log().expand(1, 4, 3)
    labels = torch.tensor([[-100, -100, 2, 0, 1]])
    mask = labels[:, 1:] != -100
    assert mask.tolist() == [[False, True, True, True]]
    assert cross_entropy(logits, labels[:, 1:], mask).item() == pytest.approx(-math.log(5 / 8 * 1 / 8 * 2 / 8) / 3)


def test_a_target_outside_the_vocabulary_is_refused():
    """Counted in the mean but worth nothing, an unmasked -100 would make the loss too small."""
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match=f"targets hold the token {wrong}, outside a vocabulary of 3: mask its"):
            cross_entropy(torch.zeros(2, 3), torch.tensor([0, wrong]))
        assert cross_entropy(torch.zeros(2, 3), torch.tensor([0, wrong]), torch.tensor([1, 0])).item() > 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: forward_kl(x, x[:, :2]), r"student logits \(2, 3, 5\) and teacher logits \(2, 2, 5\) must have one"),
        (lambda x: forward_kl(x, x, torch.ones(3, 2)), r"mask \(3, 2\) must have the logits' leading shape \(2, 3\)"),
        (lambda x: forward_kl(x, x, temperature=0.0), "temperature must be above 0, not 0"),
        (lambda x: forward_kl(x, x, temperature=math.nan), "temperature must be above 0, not nan"),
        (
            lambda x: forward_kl(x, x, temperature=torch.ones(2, 2, 1)),
            r"temperature \(2, 2, 1\) must be one number, or",
        ),
        (lambda x: forward_kl(x, x, temperature=torch.ones(3, 2)), r"or broadcast to \(2, 3, 1\)"),
        (lambda x: forward_kl(x, x, temperature=math.inf), "temperature must be finite, not inf"),
        (lambda x: cross_entropy(x, x[..., 0].long().T), r"targets \(3, 2\) must have the logits' leading shape"),
        (
            lambda x: cross_entropy(x, x[..., 0].long(), torch.ones(3, 2)),
            r"mask \(3, 2\) must have the logits' leading",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(call: Callable[[Tensor], Any], message: str):
    with pytest.raises(ValueError, match=message) as told:
        call(torch.zeros(2, 3, 5))
    assert "\n" not in str(told.value)

"""dual_head: printed values, the paper's coin by coin form in numpy, limits, centring, bans, masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from softmax_oracle import EXACT, float64

from asnn_goose.losses.dual_head import dual_head, log_cosh

pair = st.integers(1, 8).flatmap(lambda V: hnp.arrays(np.float64, (2, 3, V), elements=st.floats(-20, 20)))


def coins(s: np.ndarray, t: np.ndarray, tau: float) -> np.ndarray:
    """tau^2 sum_k KL(1/2 || sigmoid((s_k - t_k) / tau)), row by row."""
    heads = 1.0 / (1.0 + np.exp(-(s - t) / tau))
    return tau**2 * (-0.5 * np.log(heads) - 0.5 * np.log(1.0 - heads) - np.log(2.0)).sum(-1)


@pytest.mark.parametrize("centred", [True, False])
def test_printed_values(centred: bool):
    s, t = float64([[2.0, 0.0]]), float64([[1.0, 1.0]])
    value = dual_head(s, t, centred=centred).item()
    assert value == pytest.approx(0.2474384289612911, rel=EXACT)
    shifted = dual_head(s + 3.0, t, centred=centred).item()
    assert shifted == pytest.approx(0.2474384289612911 if centred else 2.2155813497652184, rel=EXACT)


@given(pair=pair, tau=st.floats(1.0, 8.0))
def test_as_a_fair_coin_against_the_students(pair: np.ndarray, tau: float):
    s, t = pair
    found = dual_head(torch.from_numpy(s), torch.from_numpy(t), tau=tau, centred=False).item()
    # 1 - sigmoid(40) is 4e-18, so numpy's logarithm of it is right to 1e-2 only at the far end; keep the near one.
    if np.abs(s - t).max() < 15 * tau:
        assert found == pytest.approx(coins(s, t, tau).mean(), rel=1e-8, abs=1e-11)
    centred_s, centred_t = s - s.mean(-1, keepdims=True), t - t.mean(-1, keepdims=True)
    wanted = dual_head(torch.from_numpy(centred_s), torch.from_numpy(centred_t), tau=tau, centred=False).item()
    centred = dual_head(torch.from_numpy(s), torch.from_numpy(t), tau=tau).item()
    assert centred == pytest.approx(wanted, rel=1e-9, abs=1e-11)


@given(pair=pair, tau=st.floats(0.5, 8.0), shifts=st.tuples(st.floats(-99, 99), st.floats(-99, 99)))
def test_laws(pair: np.ndarray, tau: float, shifts: tuple[float, float]):
    s, t = torch.from_numpy(pair).unbind(0)
    s = s.clone().requires_grad_()
    loss = dual_head(s, t, tau=tau)
    loss.backward()
    assert loss.item() >= 0.0 and dual_head(t, t, tau=tau).item() == 0.0
    assert dual_head(t, s, tau=tau).item() == pytest.approx(loss.item(), rel=1e-12)
    assert dual_head(s + shifts[0], t + shifts[1], tau=tau).item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-10)
    # Centred, a row's gradient has no part along the constant; each entry is at most tau/2 twice, over 3 tokens.
    assert s.grad is not None and s.grad.sum(-1).abs().max().item() <= 1e-12
    assert s.grad.abs().max().item() <= tau / 3 + 1e-12


def test_gradcheck():
    draw = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    t[0, 1, 2] = -torch.inf
    mask = torch.tensor([[True, True, False], [True, False, True]])
    for centred in (True, False):
        assert torch.autograd.gradcheck(lambda s, c=centred: dual_head(s, t, mask, 0.7, c), (s,))
    assert torch.autograd.gradgradcheck(log_cosh, (s,))


@pytest.mark.parametrize("x", [0.0, 1e-30, 1e-10, 1e-4, 0.01, 0.5, 0.999, 1.0, 1.001, 3.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_cosh_keeps_its_digits_from_0_to_the_largest_number(x: float, dtype: torch.dtype):
    eps = torch.finfo(dtype).eps
    if x < 1e-3:
        wanted, slope = x * x / 2 * (1 - x * x / 6), x * (1 - x * x / 3)
    elif x < 300:
        wanted, slope = math.log1p(2 * math.sinh(x / 2) ** 2), math.tanh(x)
    else:
        wanted, slope = x - math.log(2), 1.0
    for sign in (1.0, -1.0):
        at = torch.tensor(sign * x, dtype=dtype, requires_grad=True)
        value = log_cosh(at)
        value.backward()
        assert at.grad is not None
        # A few roundings; x itself is rounded to float32 first, which counts twice in a square. tiny: 1e-60 underflows.
        assert value.item() == pytest.approx(wanted, rel=6 * eps, abs=torch.finfo(dtype).tiny)
        assert at.grad.item() == pytest.approx(sign * slope, rel=6 * eps, abs=0.0)


def test_limits():
    """Near: |s - t|^2 / 8; far: tau/2 |s - t|."""
    t = torch.zeros(1, 4, dtype=torch.float64)
    near = float64([[1e-4, -2e-4, 0.0, 3e-4]])
    assert dual_head(near, t, centred=False).item() == pytest.approx(near.square().sum().item() / 8, rel=1e-7)
    far = float64([[1e6, -2e6, 0.0, 3e6]])
    assert dual_head(far, t, centred=False).item() == pytest.approx(far.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_vocabulary_of_small_differences(dtype: torch.dtype):
    """50,257 logits 0.002 apart: in float32 |x| + log1p(exp(-2 |x|)) - log 2 alone would lose 3 % of the sum."""
    draw = torch.Generator().manual_seed(0)
    t = 2 * torch.randn(1, 50_257, generator=draw)
    s = (t + 0.002 * torch.randn(1, 50_257, generator=draw)).to(dtype)
    t = t.to(dtype)
    value = dual_head(s, t)
    assert value.dtype == torch.float32
    # The inputs are the same numbers; float32 rounding of each term and of a blockwise sum.
    assert value.item() == pytest.approx(dual_head(s.double(), t.double()).item(), rel=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_a_banned_token_takes_no_part(centred: bool):
    s, t = float64([[2.0, 7.0, -1.0]]), float64([[1.0, -torch.inf, 0.5]])
    for banned in (7.0, -torch.inf, 1e300):
        given_now = s.clone()
        given_now[0, 1] = banned
        given_now.requires_grad_()
        loss = dual_head(given_now, t, centred=centred)
        loss.backward()
        assert loss.item() == pytest.approx(dual_head(s[:, ::2], t[:, ::2], centred=centred).item(), rel=EXACT)
        assert given_now.grad is not None and given_now.grad[0, 1].item() == 0.0 and given_now.grad.isfinite().all()
    nothing = torch.full((1, 3), -torch.inf)
    assert dual_head(torch.ones(1, 3), nothing, centred=centred).item() == 0.0


@given(kept=st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_mask_deletes_tokens_and_an_empty_one_gives_0(kept: list[bool]):
    mask = torch.tensor(kept)
    draw = torch.Generator().manual_seed(len(kept))
    s, t = (torch.randn(len(kept), 4, generator=draw, dtype=torch.float64) for _ in range(2))
    wanted = dual_head(s[mask], t[mask]).item()
    s[~mask], t[~mask] = torch.nan, torch.inf
    s.requires_grad_()
    loss = dual_head(s, t, mask)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-14)
    assert s.grad is not None and s.grad[~mask].eq(0).all() and s.grad.isfinite().all()
    assert any(kept) or loss.item() == 0.0


def test_token_mean_and_a_teacher_without_gradient():
    s, t = float64([2.0, 0.0]).expand(2, 3, 2), float64([1.0, 1.0]).requires_grad_()
    leaf = s.clone().requires_grad_()
    loss = dual_head(leaf, t.expand(2, 3, 2))
    loss.backward()
    assert loss.item() == pytest.approx(0.2474384289612911, rel=EXACT)
    assert t.grad is None and leaf.grad is not None


def test_bad_input_is_told_in_one_sentence():
    x = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="must have one shape"):
        dual_head(x, x[:, :2])
    with pytest.raises(ValueError, match=r"temperature must be above 0, not 0"):
        dual_head(x, x, tau=0.0)

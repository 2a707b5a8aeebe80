"""Losses between hidden states: printed values, masks, zeros, projections, layer aggregation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from softmax_oracle import float64
from torch import Tensor

from asnn_goose.losses.alignment import (
    LayerAggregation,
    Projector,
    channel_mse,
    cosine,
    mse,
    normalised_mse,
    pkd,
    token_mask,
)

ALL = {"mse": mse, "channel_mse": channel_mse, "normalised_mse": normalised_mse, "pkd": pkd, "cosine": cosine}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_printed_values():
    assert mse(float64([[1, 2, 3, 4], [0, 0, 0, 0]]), float64([[1, 1, 1, 1], [2, 0, 0, 0]])).item() == 2.25
    assert mse(float64([[1, 1], [5, 5]]), torch.zeros(2, 2).double(), torch.tensor([1, 0])).item() == 1.0
    assert mse(float64([[1, 1], [5, 5]]), torch.zeros(2, 2).double()).item() == 13.0
    assert pkd(float64([[3, 4]]), float64([[4, 3]])).item() == pytest.approx(0.08, rel=1e-13)
    assert cosine(float64([[3, 4]]), float64([[4, 3]])).item() == pytest.approx(0.04, rel=1e-13)
    both = cosine(float64([[1, 0], [3, 4]]), float64([[0, 1], [4, 3]])).item()
    assert both == pytest.approx(0.52, rel=1e-13)


def test_pkd_is_twice_the_cosine_loss():
    s, t = normal(5, 7), normal(5, 7, seed=1)
    assert pkd(s, t).item() == pytest.approx(2 * cosine(s, t).item(), rel=1e-12)


def test_the_normalised_form_does_not_see_size_and_offset():
    s, t = normal(5, 16), normal(5, 16, seed=1)
    wanted = normalised_mse(s, t).item()
    for size in (1e-6, 300.0):
        assert normalised_mse(size * s + 7 * size, size * t - 50 * size).item() == pytest.approx(wanted, rel=1e-9)
    outlier = t.clone()
    outlier[:, 3] += 1000.0
    assert mse(s, outlier) > 10_000 and normalised_mse(s, outlier) < 4.0


@pytest.mark.parametrize("name", ALL)
@given(kept=st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_mask_deletes_tokens_and_an_empty_one_gives_0(name: str, kept: list[bool]):
    mask = torch.tensor(kept)
    s, t = normal(len(kept), 4), normal(len(kept), 4, seed=1)
    wanted = ALL[name](s[mask], t[mask])
    s[~mask], t[~mask] = torch.nan, torch.inf
    s.requires_grad_()
    found = ALL[name](s, t, mask)
    found.backward()
    torch.testing.assert_close(found, wanted)
    assert s.grad is not None and s.grad[~mask].eq(0).all() and s.grad.isfinite().all()
    assert any(kept) or found.item() == 0.0


@pytest.mark.parametrize("name", ALL)
def test_equal_states_cost_nothing_and_zeros_give_no_nan(name: str):
    s = normal(3, 5)
    assert ALL[name](s, s).abs().item() <= 1e-12
    zeros = torch.zeros(3, 5, requires_grad=True)
    loss = ALL[name](zeros, torch.zeros(3, 5))
    loss.backward()
    assert loss.isfinite() and zeros.grad is not None and zeros.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", [0, 1])
def test_a_state_that_is_no_number_shows(name: str, side: int):
    pair = [normal(6, 5), normal(6, 5, seed=1)]
    pair[side][2, 3] = torch.nan
    assert ALL[name](*pair).isnan()


@pytest.mark.parametrize("loss", [pkd, cosine, normalised_mse])
def test_a_state_without_direction_is_not_pushed(loss):
    """The limit of the gradient at 0 is 1 / |s|: infinite, in the direction of whatever rounding left."""
    # The float32 mean of seven times 0.1 is another number.
    for student in (torch.zeros(2, 5), torch.full((2, 7), 0.1) if loss is normalised_mse else torch.zeros(2, 7)):
        student.requires_grad_()
        value = loss(student, normal(*student.shape).float())
        value.backward()
        assert value.item() == pytest.approx(1.0, rel=1e-6)
        assert student.grad is not None and student.grad.eq(0).all()


@pytest.mark.parametrize("left", [0.0, 1e-7])
def test_a_channel_that_the_teacher_does_not_use_adds_nothing(left: float):
    s, t = normal(6, 3), normal(6, 3, seed=1)
    t[:, 1] *= left  # a mean square of 1e-14 of the others' is no size
    wanted = ((s - t).square().mean(0) / t.square().mean(0))[[0, 2]].sum() / 3
    assert channel_mse(s, t).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert channel_mse(1e-9 * s, 1e-9 * t).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert channel_mse(s, torch.zeros(6, 3)).item() == 0.0


@pytest.mark.parametrize("name", ALL)
def test_gradcheck_and_a_teacher_without_gradient(name: str):
    s, t = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, t), (s,))
    ALL[name](s, t).backward()
    assert t.grad is None


def test_the_first_token_of_each_window_is_left_out():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    assert token_mask(mask).tolist() == mask.tolist()
    skipped = token_mask(mask, skip_first=True)
    assert skipped.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_projectors_go_from_student_to_teacher():
    x = normal(2, 3, 6).bfloat16()
    linear = Projector(6, 10)
    assert linear.map.weight.shape == (10, 6)
    assert linear(x).shape == (2, 3, 10) and linear(x).dtype == torch.float32
    assert Projector(6, 10, "mlp")(x).shape == (2, 3, 10)
    # SpikeBERT's transform ends in a LayerNorm without a scale of its own yet: mean 0, variance 1 per token.
    normed = Projector(6, 10, "linear_norm")(5.0 * x)
    assert normed.mean(-1).abs().max() < 1e-6 and (normed.var(-1, correction=0) - 1).abs().max() < 1e-3
    assert Projector(6, 6, "none")(x) is x
    with pytest.raises(ValueError, match=r"needs equal widths, not 6 \(student\) and 10"):
        Projector(6, 10, "none")
    with pytest.raises(ValueError, match="must be linear, linear_norm, mlp or none, not 'deep'"):
        Projector(6, 10, "deep")


def test_states_of_unequal_width_are_refused():
    with pytest.raises(ValueError, match="cannot be compared: project the student's"):
        mse(normal(2, 3), normal(2, 4))
    with pytest.raises(ValueError, match="must have the states' leading shape"):
        mse(normal(2, 3), normal(2, 3), torch.ones(3))


def test_layer_aggregation_by_hand():
    """Gates of 1/2 over constants 1, 2, 3: 1, 1.5, 2.25."""
    states = [torch.full((2, 4), value) for value in (1.0, 2.0, 3.0)]
    for layers, value in ((1, 1.0), (2, 1.5), (3, 2.25)):
        aggregate, entropy = LayerAggregation(4, layers)(states[:layers])
        assert aggregate.eq(value).all()
        assert entropy.item() == pytest.approx(math.log(2) if layers > 1 else 0.0)
    decided = LayerAggregation(4, 2)
    torch.nn.init.constant_(decided.gates[0].bias, 50.0)  # pyright: ignore[reportArgumentType]
    aggregate, entropy = decided(states[:2])
    assert aggregate.eq(2.0).all() and entropy.item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="for 2 layers, not 3"):
        decided(states)

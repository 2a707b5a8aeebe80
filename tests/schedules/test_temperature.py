"""Signs, sizes and limits of the learnable temperature; printed numbers are of worked examples.

Those of 2.4 hold for T = exp(theta). ``LogTwin`` is that form, put together from the parts under test.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from asnn_goose.losses import forward_kl
from asnn_goose.schedules import (
    LearnableTemperature,
    anchor_penalty,
    cosine_lambda,
    reverse_gradient,
)

TEACHER, STUDENT = torch.tensor([2.0, 1.0, 0.0]).double(), torch.tensor([0.5, 1.0, -0.5]).double()
SLOPE_AT_3 = -0.00710656308867329
"""G = dL_KD/dT at T = 3: the printed KD part of d/dtheta, -0.021319689266, over T."""


def distillation(T: Tensor) -> Tensor:
    return forward_kl(STUDENT, TEACHER, temperature=T)


class LogTwin(nn.Module):
    """T = exp(theta) in float64, with the same two outputs as LearnableTemperature."""

    def __init__(self, init: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(math.log(init), dtype=torch.float64))

    def forward(self, lam: float = 0.0) -> tuple[Tensor, Tensor]:
        return reverse_gradient(self.theta, lam).exp(), self.theta.exp()


def bounded(init: float, low: float, high: float) -> LearnableTemperature:
    """In float64, with the raw value at init to all its digits."""
    module = LearnableTemperature(init, low, high).double()
    with torch.no_grad():
        module.raw.copy_(torch.logit(torch.tensor((init - low) / (high - low), dtype=torch.float64)))
    return module


def slope(value: Tensor, parameter: Tensor) -> float:
    return torch.autograd.grad(value, parameter)[0].item()


def test_lambda_over_ten_epochs():
    printed = [
        0, 0.0244717419, 0.0954915028, 0.2061073739, 0.3454915028, 0.5,
        0.6545084972, 0.7938926261, 0.9045084972, 0.9755282581, 1,
    ]  # fmt: skip
    assert [cosine_lambda(e, 0, 10) for e in range(11)] == pytest.approx(printed, abs=6e-11)
    assert [cosine_lambda(e, 0, 10) for e in (11, 1000)] == [1.0, 1.0]


def test_lambda_is_0_while_it_waits():
    assert [cosine_lambda(step, 200.0, 1000.0) for step in (0, 100, 200)] == [0.0] * 3
    assert cosine_lambda(201, 200.0, 1000.0) > 0.0
    assert cosine_lambda(600, 200.0, 1000.0) == pytest.approx(0.5)
    assert cosine_lambda(1000, 200.0, 1000.0) == 1.0


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0, 5000), st.floats(1e-3, 5000))
def test_lambda_never_falls_and_stays_in_its_range(a: int, b: int, start: float, length: float):
    low, high = (cosine_lambda(step, start, start + length) for step in sorted((a, b)))
    assert 0.0 <= low <= high <= 1.0


def test_sigmoid_bounds_by_the_printed_numbers():
    module = bounded(11.0, 1.0, 21.0)
    assert module()[1].item() == 11.0
    with torch.no_grad():
        module.raw.fill_(1.0)
    T = module()[1]
    assert T.item() == pytest.approx(15.621171572600097, rel=1e-14)
    assert slope(T, module.raw) == pytest.approx(3.9322386648296366, rel=1e-14)
    assert LearnableTemperature(2.0, 1.0, 21.0).double().raw.item() == pytest.approx(-2.9444389791664403, rel=1e-7)


@given(st.floats(0.5, 20), st.floats(0.5, 20), st.floats(0.01, 0.99))
def test_it_starts_at_init(a: float, b: float, share: float):
    low, high = sorted((a, b))
    if high - low < 0.1:
        return
    init = low + share * (high - low)
    adversarial, plain = LearnableTemperature(init, low, high)(0.7)
    assert adversarial.item() == plain.item() == pytest.approx(init, rel=1e-5)


@pytest.mark.parametrize("bound", [0.12, 1.13])
def test_it_starts_beside_a_bound(bound: float):
    """The share of the way from 0.12 to 1.13 at which the neighbour of 1.13 lies rounds to 1, whose logit is inf."""
    init = math.nextafter(bound, 1.0)
    exact = math.log(Fraction(init) - Fraction(0.12)) - math.log(Fraction(1.13) - Fraction(init))
    assert LearnableTemperature(init, 0.12, 1.13).raw.item() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_adversary_raises_the_divergence_and_the_anchor_stays_outside(lam: float):
    """T = 3, anchor 2, c = 0.1: d/dtheta of KD -0.0213, of the regulariser +0.6."""
    twin = LogTwin(3.0)
    kd, anchor = slope(distillation(twin()[1]), twin.theta), slope(anchor_penalty(twin()[1], 2.0, 0.1), twin.theta)
    assert kd == pytest.approx(-0.021319689266, abs=6e-13)
    assert anchor == pytest.approx(0.6, rel=1e-13)

    adversarial, plain = twin(lam)
    correct = slope(distillation(adversarial) + anchor_penalty(plain, 2.0, 0.1), twin.theta)
    printed = {0.0: 0.6, 0.5: 0.6106598446330109, 1.0: 0.6213196892660215}[lam]
    assert correct == pytest.approx(printed, rel=1e-13)

    adversarial, _ = twin(lam)
    inside = slope(distillation(adversarial) + anchor_penalty(adversarial, 2.0, 0.1), twin.theta)
    printed = {0.0: 0.0, 0.5: -0.28934015536698965, 1.0: -0.5786803107339793}[lam]
    assert inside == pytest.approx(printed, rel=1e-13, abs=1e-16)


@pytest.mark.parametrize(("lam", "weight"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.7)])
def test_the_same_terms_through_the_sigmoid(lam: float, weight: float):
    """T = 3 in [1, 5], where dT/draw = 1: the raw gradient at lambda 1 is 0.2071065630. The KD weight scales G."""
    module = bounded(3.0, 1.0, 5.0)
    adversarial, plain = module(lam)
    assert adversarial.item() == plain.item() == pytest.approx(3.0, rel=1e-15)
    found = slope(weight * distillation(adversarial) + anchor_penalty(plain, 2.0, 0.1), module.raw)
    assert found == pytest.approx(0.2 - lam * weight * SLOPE_AT_3, rel=1e-12)
    if lam == weight == 1.0:
        assert found == pytest.approx(0.2071065630, abs=1e-10)
        adversarial, _ = module(lam)
        inside = slope(distillation(adversarial) + anchor_penalty(adversarial, 2.0, 0.1), module.raw)
        assert inside == pytest.approx(-0.2 - SLOPE_AT_3, rel=1e-12)


@pytest.mark.parametrize(("T", "value", "grad"), [(4, 0.4, 1.6), (2, 0, 0), (1.5, 0.025, -0.15), (10, 6.4, 16)])
def test_anchor_by_hand(T: float, value: float, grad: float):
    twin = LogTwin(T)
    penalty = anchor_penalty(twin()[1], 2.0, 0.1)
    assert penalty.item() == pytest.approx(value, rel=1e-13, abs=1e-30)
    assert slope(penalty, twin.theta) == pytest.approx(grad, rel=1e-13, abs=1e-14)


def descend(module: nn.Module, steps: int, lr: float, loss) -> list[float]:
    """T after every step of plain SGD, whose gradient is clipped to 5."""
    (raw,) = module.parameters()
    optimiser = torch.optim.SGD([raw], lr=lr)
    track = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss(module).backward()
        assert raw.grad is not None
        raw.grad.clamp_(-5.0, 5.0)
        optimiser.step()
        track.append(module()[1].item())
    return track


def game(anchored: bool):
    """Adversary at lambda 1, with the anchor at 2 outside or inside the reversal."""

    def loss(module: nn.Module) -> Tensor:
        adversarial, plain = module(1.0)
        return distillation(adversarial) + anchor_penalty(plain if anchored else adversarial, 2.0, 0.1)

    return loss


def test_400_steps_end_at_the_stationary_point():
    """lambda w G(T) = 2 c (T - a) has its root at 1.9425111492; with the anchor reversed T runs away."""
    T = descend(LogTwin(2.5), 400, 0.05, game(anchored=True))[-1]
    assert abs(T - 1.942511) < 6e-7
    root = torch.tensor(1.9425111492, dtype=torch.float64, requires_grad=True)
    assert 2.0 + 5.0 * slope(distillation(root), root) == pytest.approx(1.9425111492, abs=1e-10)
    assert descend(bounded(2.5, 1.0, 5.0), 400, 0.5, game(anchored=True))[-1] == pytest.approx(root.item(), abs=1e-6)
    assert max(descend(LogTwin(2.5), 399, 0.05, game(anchored=False))) > 1e6


def test_without_reversal_it_climbs_to_the_bound_and_with_it_it_stops_inside():
    """Minimising T^2 KL over T is what ran away; its maximum lies at 1.0835880 for this pair."""
    minimised = descend(bounded(2.0, 1.0, 10.0), 1000, 50.0, lambda module: distillation(module()[1]))
    assert minimised[-1] > 9.5
    maximised = descend(bounded(2.0, 1.0, 10.0), 1000, 50.0, lambda module: distillation(module(1.0)[0]))
    assert maximised[-1] == pytest.approx(1.0835880, abs=1e-4)


@pytest.mark.parametrize("raw", [-60.0, -20.0, 0.0, 17.0, 60.0])
def test_every_raw_value_has_the_sigmoids_slope(raw: float):
    module = LearnableTemperature(2.0, 1.0, 5.0)
    with torch.no_grad():
        module.raw.fill_(raw)
    _, plain = module(1.0)
    exact = 4.0 / (1.0 + math.exp(-abs(raw))) * (math.exp(-abs(raw)) / (1.0 + math.exp(-abs(raw))))
    # Relative alone: at raw 60 the slope is 3.5e-26.
    assert slope(plain, module.raw) == pytest.approx(exact, rel=1e-5, abs=0.0)


@pytest.mark.parametrize("raw", [-1e30, -1e4, -110.0, 90.0, 1e4, 1e30])
def test_no_raw_value_is_beyond_the_anchors_reach(raw: float):
    """The sigmoid's own slope there, e^-90, is no float32; beyond 60 it stays as it is at 60."""
    module = LearnableTemperature(2.0, 1.0, 5.0)
    with torch.no_grad():
        module.raw.fill_(raw)
    _, plain = module(1.0)
    assert plain.item() == (5.0 if raw > 0 else 1.0)
    assert slope(plain, module.raw) == pytest.approx(4.0 * math.exp(-60.0), rel=1e-5, abs=0.0)


@pytest.mark.parametrize(("raw", "sign"), [(12.0, 1.0), (-12.0, -1.0)])
def test_far_outside_the_anchor_still_pulls(raw: float, sign: float):
    """A clamp has no slope there: exp(theta).clamp(1, 10) at 12 has R = 6.4 and gradient 0, and at 9.9 15.642."""
    theta = torch.tensor([math.log(12.0), math.log(9.9), math.log(0.9)], dtype=torch.float64, requires_grad=True)
    clamped = anchor_penalty(theta.exp().clamp(1.0, 10.0), 2.0, 0.1)
    assert clamped.tolist() == pytest.approx([6.4, 0.1 * 7.9**2, 0.1])
    (grad,) = torch.autograd.grad(clamped.sum(), theta)
    assert grad.tolist() == pytest.approx([0.0, 15.642, 0.0], abs=1e-9)

    module = LearnableTemperature(2.0, 1.0, 5.0)
    with torch.no_grad():
        module.raw.fill_(raw)
    _, plain = module(1.0)
    assert sign * slope(anchor_penalty(plain, 2.0, 0.1), module.raw) > 1e-6
    assert 1.0 < plain.item() < 5.0


def test_lambda_0_leaves_the_temperature_to_the_anchor():
    module = bounded(3.0, 1.0, 5.0)
    adversarial, _ = module(0.0)
    assert slope(distillation(adversarial), module.raw) == 0.0


def test_the_students_gradient_does_not_know_the_reversal():
    s = STUDENT.clone().requires_grad_()
    module = bounded(3.0, 1.0, 5.0)
    grads = [torch.autograd.grad(forward_kl(s, TEACHER, temperature=T), s)[0] for T in (*module(1.0), module()[1], 3.0)]
    for grad in grads[1:3]:
        assert torch.equal(grad, grads[0])
    torch.testing.assert_close(grads[3], grads[0], rtol=1e-14, atol=0)


def test_a_step_with_zero_loss_leaves_it_unchanged():
    module = LearnableTemperature(2.0, 1.0, 5.0)
    before = module.raw.item()
    adversarial, plain = module(1.0)
    # Student equals teacher and T stands on its anchor.
    (forward_kl(TEACHER, TEACHER, temperature=adversarial) + anchor_penalty(plain, plain.item(), 0.1)).backward()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    assert module.raw.item() == before


def test_reversal_is_the_identity_with_a_negative_multiple_of_the_gradient():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.25)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, torch.tensor([4.0, 8.0]))
    assert grad.tolist() == [-1.0, -2.0]


def test_bad_input():
    with pytest.raises(ValueError, match=r"lambda must be at least 0 .*, not -0.5"):
        LearnableTemperature(2.0, 1.0, 5.0)(-0.5)
    for init in (1.0, 5.0, 7.0):
        with pytest.raises(
            ValueError, match=rf"init \({init}\) must lie strictly between low \(1.0\) and high \(5.0\)"
        ):
            LearnableTemperature(init, 1.0, 5.0)
    with pytest.raises(ValueError, match=r"lambda must be at least 0 .*, not nan"):
        reverse_gradient(torch.ones(1), math.nan)
    with pytest.raises(ValueError, match="low must be at least 0, not -3"):
        LearnableTemperature(2.0, -3.0, 5.0)
    with pytest.raises(ValueError, match="high must be finite, not inf"):
        LearnableTemperature(2.0, 1.0, math.inf)
    with pytest.raises(ValueError, match=r"must start \(5\) before it ends \(5\)"):
        cosine_lambda(1, 5, 5)
    with pytest.raises(ValueError, match="step must be a number of optimiser steps, not nan"):
        cosine_lambda(math.nan, 0, 10)  # pyright: ignore[reportArgumentType]

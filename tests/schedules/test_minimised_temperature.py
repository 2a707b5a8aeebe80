"""The temperature that goes down the loss: where it ends, and that nothing brings it back."""

import math

import pytest
import torch

from asnn_goose.losses import forward_kl
from asnn_goose.schedules import LearnableTemperature, MinimisedTemperature, anchor_penalty


def test_a_minimised_temperature_climbs_to_its_bound_and_the_adversary_does_not():
    """400 steps on one pair of logits in [1, 10] from 2: the end of each game."""
    t, s = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([0.5, 1.0, -0.5], dtype=torch.float64)
    ends = {}
    for name, module in {
        "minimised": MinimisedTemperature(2.0, 1.0, 10.0),
        "learned": LearnableTemperature(2.0, 1.0, 10.0),
    }.items():
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(400):
            optimiser.zero_grad()
            adversarial, _ = module(1.0)
            forward_kl(s, t, temperature=adversarial).backward()
            optimiser.step()
        ends[name] = module()[1].item()
    assert ends["minimised"] == 10.0
    # The adversary's own maximum, which it has to reach from a sigmoid that is flat near its bound.
    assert 1.05 < ends["learned"] < 1.25


def test_beyond_its_clamp_a_minimised_temperature_has_no_gradient_left():
    """At raw T = 12 the regulariser is 6.4 and pulls with 0; at 9.9 with 15.642; at 0.9 with 0."""
    module = MinimisedTemperature(2.0, 1.0, 10.0)
    found = {}
    for T in (12.0, 9.9, 0.9):
        with torch.no_grad():
            module.raw.fill_(math.log(T))
        module.zero_grad()
        penalty = anchor_penalty(module()[1], 2.0, 0.1)
        penalty.backward()
        assert module.raw.grad is not None
        found[T] = (penalty.item(), module.raw.grad.item())
    assert found[12.0] == (pytest.approx(6.4, rel=1e-6), 0.0) and found[0.9] == (pytest.approx(0.1, rel=1e-6), 0.0)
    assert found[9.9][1] == pytest.approx(15.642, rel=1e-5)

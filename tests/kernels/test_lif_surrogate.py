"""The surrogates against their closed-form antiderivatives, quadrature, and SpikingJelly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate as spikingjelly

from asnn_goose.kernels.lif.surrogate import DEFAULT_WIDTH, derivative

SHAPES = sorted(DEFAULT_WIDTH)
HEIGHT = {"atan": 1.0, "triangle": 1.0, "sigmoid": 0.25, "superspike": 1.0, "rectangle": 1.0}
INTEGRAL = {"atan": 1.0, "triangle": 1.0, "sigmoid": 1.0, "superspike": 2.0, "rectangle": 1.0}

# G with G' = g, and G(0) = 0.
ANTIDERIVATIVE = {
    "atan": lambda u, w: math.atan(math.pi * u / w) / math.pi,
    "triangle": lambda u, w: math.copysign(min(abs(u), w) / w - (min(abs(u), w) / w) ** 2 / 2, u),
    "sigmoid": lambda u, w: 0.5 * math.tanh(u / (2 * w)),
    "superspike": lambda u, w: u / (w + abs(u)),
    "rectangle": lambda u, w: min(max(u / w, -0.5), 0.5),
}
PEERS = {
    "atan": spikingjelly.ATan(),
    "triangle": spikingjelly.PiecewiseQuadratic(),
    "sigmoid": spikingjelly.Sigmoid(),
    "superspike": spikingjelly.SuperSpike(),
    "rectangle": spikingjelly.Rect(),
}


@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_slope_of_its_antiderivative(shape: str, width: float):
    kinks = np.array([0.0, width / 2, width])
    grid = np.array([u for u in np.linspace(-4, 4, 161) if np.abs(np.abs(u) - kinks).min() > 1e-3])
    h = 1e-5
    G = ANTIDERIVATIVE[shape]
    slope = [(G(u + h, width) - G(u - h, width)) / (2 * h) for u in grid]
    # Central differences: h^2 g'' / 6 is below 1e-7 at width 0.3, rounding below 1e-10.
    np.testing.assert_allclose(derivative(torch.tensor(grid), shape, width), slope, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_height_and_integral_are_those_of_the_table(shape: str, width: float):
    assert derivative(torch.zeros(1, dtype=torch.float64), shape, width).item() == pytest.approx(HEIGHT[shape] / width)
    # u = x / (1 - x^2) maps the line to (-1, 1), where midpoints do well also with heavy tails.
    x = (np.arange(200_000) + 0.5) / 100_000 - 1.0
    u = width * x / (1 - x**2)
    weight = width * (1 + x**2) / (1 - x**2) ** 2
    area = (derivative(torch.tensor(u), shape, width).numpy() * weight).mean() * 2
    # The rectangle's edge falls inside one of the cells.
    assert area == pytest.approx(INTEGRAL[shape], abs=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_default_width_is_spikingjellys_default(shape: str):
    edges = {"rectangle": 0.5}
    u = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    # SpikingJelly's rectangle is open, ours is closed.
    u = u[u.abs() != edges.get(shape, -1.0)].requires_grad_()
    PEERS[shape](u).sum().backward()
    torch.testing.assert_close(derivative(u.detach(), shape, DEFAULT_WIDTH[shape]), u.grad, rtol=1e-13, atol=1e-15)


@given(u=st.floats(0, 1e6, width=32), width=st.floats(0.0625, 8.0, width=32), shape=st.sampled_from(SHAPES))
def test_is_even_bounded_and_falls_away_from_the_threshold(u: float, width: float, shape: str):
    at = derivative(torch.tensor([u, -u, 0.0, 2 * u]), shape, width)
    assert at[0] == at[1]
    assert 0.0 <= at[3] <= at[0] <= at[2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("u", [1e4, 1e20, torch.inf])
def test_far_from_the_threshold_it_is_0_and_not_nan(shape: str, u: float):
    for dtype in (torch.float32, torch.float64):
        g = derivative(torch.tensor([-u, u], dtype=dtype), shape, DEFAULT_WIDTH[shape])
        assert (g <= 1e-7).all(), g


def test_rectangle_is_closed():
    u = torch.tensor([-0.5, 0.5, 0.5 + 2**-20])
    assert derivative(u, "rectangle", 1.0).tolist() == [1.0, 1.0, 0.0]


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"one of .*'atan'.*not 'arctan'"):
        derivative(torch.zeros(1), "arctan", 1.0)

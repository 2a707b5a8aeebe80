"""Surrogate derivatives of the spike: g(u), u the distance of the membrane from the threshold.

Each shape is even and peaks at u = 0 with height 1/width (sigmoid: 1/(4 width)). Its default width makes the height 1
and gives SpikingJelly's default of the same name: sigmoid alpha 4, atan alpha 2, piecewise quadratic, SuperSpike and
rectangle alpha 1 (whose end points SpikingJelly leaves out).

========== ======================================= ======= ====================
name       g(u)                                    default integral over u
========== ======================================= ======= ====================
atan       1/w / (1 + (pi u / w)^2)                1.0     1
triangle   1/w max(0, 1 - |u| / w)                 1.0     1
sigmoid    1/w s(u/w) (1 - s(u/w))                 0.25    1
superspike 1/w / (1 + |u| / w)^2                   1.0     2
rectangle  1/w where |u| <= w/2                    1.0     1
========== ======================================= ======= ====================
"""

import math

import torch
from torch import Tensor

DEFAULT_WIDTH = {"atan": 1.0, "triangle": 1.0, "sigmoid": 0.25, "superspike": 1.0, "rectangle": 1.0}

CODES = {shape: code for code, shape in enumerate(DEFAULT_WIDTH)}
"""The number by which the compiled forms know a shape."""


def derivative(u: Tensor, shape: str, width: float) -> Tensor:
    """g(u) elementwise, in u's dtype and units of 1/width."""
    if shape == "atan":
        return 1.0 / (width * (1.0 + (u * (math.pi / width)) ** 2))
    if shape == "triangle":
        return (1.0 - u.abs() / width).clamp_min(0.0) / width
    if shape == "sigmoid":
        # s(z) (1 - s(z)) = 1 / (2 cosh(z/2))^2 neither rounds to 0 in the upper tail nor wavers around its peak.
        return 0.25 / torch.cosh(u / (2.0 * width)) ** 2 / width
    if shape == "superspike":
        return 1.0 / (width * (1.0 + u.abs() / width) ** 2)
    if shape == "rectangle":
        return (u.abs() <= 0.5 * width).to(u.dtype) / width
    raise ValueError(f"surrogate must be one of {sorted(DEFAULT_WIDTH)}, not {shape!r}")

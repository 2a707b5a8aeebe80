"""The teacher's tail at any temperature from a few numbers: L(u) = log sum over the tail of p_i^u, with u = 1/T.

L is a log-partition function, smooth and convex in u, so the polynomial through its values at NODES gives it
between them. L(1) is the log of the tail's mass.

Shapes: N rows, J nodes.
"""

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = 1.0, 5.0
"""Temperatures that the nodes span."""

_CENTRE, _RADIUS, _DEGREE = 0.5 * (1 / LOWEST + 1 / HIGHEST), 0.5 * (1 / LOWEST - 1 / HIGHEST), 6

NODES = tuple(_CENTRE + _RADIUS * math.cos(math.pi * j / _DEGREE) for j in range(_DEGREE + 1))
"""Chebyshev points of the second kind in u = 1/T, from 1/LOWEST down to 1/HIGHEST."""


def log_tail(log_tail_NJ: Tensor, temperature: Tensor | float) -> Tensor:
    """L(1/T) [N], differentiable in T.

    Args:
        log_tail_NJ: L at NODES.
        temperature: T, a number, a scalar tensor, or one for each row [N, 1].

    Raises:
        ValueError: T outside [LOWEST, HIGHEST], where the polynomial would extrapolate.
    """
    T = torch.as_tensor(temperature, dtype=torch.float64, device=log_tail_NJ.device)
    outside = T.detach()[~((T.detach() >= LOWEST) & (T.detach() <= HIGHEST))]
    if outside.numel():
        raise ValueError(f"a stored tail serves temperatures from {LOWEST:g} to {HIGHEST:g}, not {outside[0].item():g}")
    nodes_J = torch.tensor(NODES, dtype=torch.float64, device=T.device)
    # Lagrange's basis, written as products: a barycentric quotient would be 0/0 at a node.
    offsets_NJ = 1.0 / T.reshape(-1, 1) - nodes_J
    basis = []
    for j, node in enumerate(NODES):
        others = [i for i in range(len(NODES)) if i != j]
        basis.append(offsets_NJ[:, others].prod(-1) / math.prod(node - NODES[i] for i in others))
    # A teacher without a tail has -inf at every node, which no weight may touch.
    empty_N = log_tail_NJ[:, 0] == -torch.inf
    values_NJ = log_tail_NJ.masked_fill(empty_N[:, None], 0.0)
    basis_NJ = torch.stack(basis, -1).to(log_tail_NJ.dtype)
    return (values_NJ * basis_NJ).sum(-1).masked_fill(empty_N, -torch.inf)

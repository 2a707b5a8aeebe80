"""Projecting conflicts between the terms' gradients away: PCGrad, and the one-sided form of DHKD."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from asnn_goose.train.term_gradients import Balancer, Gradients, check_reference, inner_products

EPS = 1e-30
"""Smallest squared norm that a projection divides by."""


def project_conflicts(products: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Row i: coefficients, in the original gradients, of g_i after its conflicts are projected away.

    For each j of ``orders[i]`` in turn, where g_i' . g_j < 0:  g_i' <- g_i' - (g_i' . g_j) / |g_j|^2 g_j, with the
    original g_j. Only inner products enter, so that no copy of a gradient is made.

    Args:
        products: <g_i, g_j>, float64 [n, n].
        orders: for each term the terms that it gives way to.
    """
    rows = torch.eye(len(orders), dtype=products.dtype)
    for i, others in enumerate(orders):
        for j in others:
            overlap = rows[i] @ products[:, j]
            if overlap < 0:
                rows[i, j] -= overlap / products[j, j].clamp_min(EPS)
    return rows


class Projection(Balancer):
    """Factors from projected gradients, measured on every step; subclasses say who gives way to whom."""

    def order(self, step: int) -> list[list[int]]:
        raise NotImplementedError

    def needs_gradients(self, step: int) -> bool:
        return True

    def _factors(self, step: int, gradients: Gradients, losses: Mapping[str, float]) -> dict[str, float]:
        rows = project_conflicts(inner_products(gradients), self.order(step))
        return dict(zip(self.names, rows.sum(0).tolist(), strict=True))


class PCGrad(Projection):
    """Every term gives way to every other, in an order drawn per term and step (PCGrad, arXiv 2001.06782).

    Args:
        names: the terms.
        seed: with the step it fixes the order, so that there is no state.
    """

    def __init__(self, names: Iterable[str], seed: int = 0):
        super().__init__(names)
        self.seed = seed

    def order(self, step: int) -> list[list[int]]:
        """For each term the others, shuffled by (seed, step)."""
        draw = np.random.default_rng([self.seed, step])
        terms = range(len(self.names))
        return [[int(j) for j in draw.permutation(len(self.names)) if j != i] for i in terms]


class ProjectKD(Projection):
    """Every term but the reference gives way to it, and the reference to none (gradient alignment of DHKD, 2411.08937).

    Args:
        names: the terms.
        reference: the term whose gradient stays as it is.
    """

    def __init__(self, names: Iterable[str], reference: str = "ce"):
        super().__init__(names)
        check_reference(self.names, reference)
        self.reference = reference

    def order(self, step: int) -> list[list[int]]:
        return [[] if name == self.reference else [self.names.index(self.reference)] for name in self.names]

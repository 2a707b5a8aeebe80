"""Weights that balance the terms of the objective, from gradient norms or learned, and the list of all methods.

Each is a :class:`~asnn_goose.train.term_gradients.Balancer`; that file says what gradients and losses it is given, and
what a gradient per term costs.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from asnn_goose.train.conflict import PCGrad, ProjectKD
from asnn_goose.train.term_gradients import Balancer, Gradients, check_reference, inner_products


class GradientNorms(Balancer):
    """Bring each term's gradient norm to ``ratio`` times the reference's.

    factor_n = clamp(ratio m_ref / m_n, low, high), m an exponential moving average of measured norms; the reference
    keeps factor 1. Terms of equal value can have gradients of very unequal size, hence norms and not values.

    Norms are measured with the configured weights, so between the clamps the weight of a balanced term, and a ramp of
    it, cancels: ``ratio`` stands in its place. A term whose gradient is 0 is not measured on that step, nor is any
    where the reference's is 0; a term that was never measured has factor 1.

    Args:
        names: the terms.
        reference: the term that the others are compared with.
        ratio: target of a balanced norm over the reference's.
        every: optimiser steps between two measurements.
        decay: of the moving average, per measurement; its first value is the first norm.
        low, high: range of the factors.
    """

    def __init__(
        self,
        names: Iterable[str],
        reference: str = "ce",
        ratio: float = 1.0,
        every: int = 10,
        decay: float = 0.9,
        low: float = 0.1,
        high: float = 10.0,
    ):
        super().__init__(names)
        check_reference(self.names, reference)
        if not 0.0 < low <= high:
            raise ValueError(f"low ({low}) must be above 0 and at most high ({high})")
        self.reference, self.ratio, self.every = reference, ratio, every
        self.decay, self.low, self.high = decay, low, high
        self._norms: dict[str, float] = {}

    def needs_gradients(self, step: int) -> bool:
        return step % self.every == 0 or not self._norms

    def weights(self) -> dict[str, float]:
        factors = super().weights()
        for name, norm in self._norms.items():
            if name != self.reference:
                factors[name] = min(max(self.ratio * self._norms[self.reference] / norm, self.low), self.high)
        return factors

    def _factors(self, step: int, gradients: Gradients, losses: Mapping[str, float]) -> dict[str, float]:
        if self.needs_gradients(step):
            sizes = inner_products(gradients).diagonal().sqrt().tolist()
            norms: dict[str, float] = dict(zip(self.names, sizes, strict=True))
            for name, norm in norms.items():
                if norm > 0.0 and norms[self.reference] > 0.0:
                    self._norms[name] = self.decay * self._norms.get(name, norm) + (1.0 - self.decay) * norm
        return self.weights()

    def state_dict(self) -> dict[str, dict[str, float] | None]:
        return {"norms": dict(self._norms)}

    def load_state_dict(self, state: Mapping[str, dict[str, float] | None]) -> None:
        self._norms = dict(state["norms"] or {})


def gradnorm_objective(weights: Tensor, norms: Tensor, progress: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """(sum_i |G_i - target_i|, targets), G_i = w_i norms_i, target_i = mean(G) r_i^strength, r = progress / its mean.

    The targets carry no gradient: otherwise all weights shrinking together would lower the objective.
    """
    sizes = weights * norms
    targets = (sizes.mean() * (progress / progress.mean()) ** strength).detach()
    return (sizes - targets).abs().sum(), targets


class GradNorm(Balancer):
    """Weights learned so that terms which fell less have larger gradients (GradNorm, arXiv 1711.02257).

    One plain gradient step on :func:`gradnorm_objective` per optimiser step, progress_i = L_i / L_i(0), then w is
    scaled back to sum n, and acts from the next step on. Factors are 1 until :meth:`record_start` gives L(0): call it
    when learning rate and weights have warmed up, since a term that starts at weight 0 has no L(0).

    Args:
        names: the terms.
        lr: of the weights, in units of 1 / gradient norm.
        strength: the paper's alpha, how strongly slower terms are pushed.
        floor: smallest weight before the scaling, above 0: a negative one would climb its loss.
    """

    def __init__(self, names: Iterable[str], lr: float = 0.025, strength: float = 1.5, floor: float = 1e-3):
        super().__init__(names)
        if not 0.0 < floor < 1.0:
            raise ValueError(f"floor must lie strictly between 0 and 1, not {floor}")
        self.lr, self.strength, self.floor = lr, strength, floor
        self._start: dict[str, float] | None = None
        self._weights = dict.fromkeys(self.names, 1.0)

    def record_start(self, losses: Mapping[str, float]) -> None:
        """Take L(0) and balance from here on.

        Raises:
            ValueError: an L(0) that is not above 0.
        """
        self._check(losses)
        for name, value in losses.items():
            if not value > 0.0:
                raise ValueError(f"loss term {name} is {value} as GradNorm starts: start when it is above 0")
        self._start = dict(losses)

    def needs_gradients(self, step: int) -> bool:
        return self._start is not None

    def weights(self) -> dict[str, float]:
        return dict(self._weights)

    def _factors(self, step: int, gradients: Gradients, losses: Mapping[str, float]) -> dict[str, float]:
        applied = self.weights()
        shares = [losses[name] / self._start[name] for name in self.names] if self._start else []
        # Terms that are all 0 have nothing to balance.
        if any(shares):
            weights = torch.tensor([applied[name] for name in self.names], dtype=torch.float64, requires_grad=True)
            norms = inner_products(gradients).diagonal().sqrt()
            progress = torch.tensor(shares, dtype=torch.float64)
            objective, _ = gradnorm_objective(weights, norms, progress, self.strength)
            (slopes,) = torch.autograd.grad(objective, weights)
            moved = (weights.detach() - self.lr * slopes).clamp_min(self.floor)
            self._weights = dict(zip(self.names, (moved * len(moved) / moved.sum()).tolist(), strict=True))
        return applied

    def _check(self, losses: Mapping[str, float]) -> None:
        super()._check(losses)
        for name, value in losses.items():
            if value < 0.0:
                raise ValueError(f"loss term {name} is {value}, and GradNorm compares shares of losses of at least 0")

    def state_dict(self) -> dict[str, dict[str, float] | None]:
        return {"weights": self.weights(), "start": self._start}

    def load_state_dict(self, state: Mapping[str, dict[str, float] | None]) -> None:
        self._weights, self._start = dict(state["weights"] or {}), state["start"]


def uncertainty_objective(losses: Tensor, log_variances: Tensor) -> Tensor:
    """sum_i exp(-s_i) L_i / 2 + s_i / 2, smallest at s_i = log L_i.

    What s descends on, and nothing to report or to stop on: it falls below every bound as a loss goes to 0.
    """
    return 0.5 * ((-log_variances).exp() * losses + log_variances).sum()


class Uncertainty(Balancer):
    """factor_i = exp(-s_i) / 2 with a learned log variance s_i per term (arXiv 1705.07115).

    s takes one plain gradient step on :func:`uncertainty_objective` per optimiser step, which acts from the next one
    on. The factor tends to 1 / (2 L_i), so it grows without bound just when a term succeeds: s is held in [low, high].
    The bound is on the stored value, so the gradient at it still leads back. Needs no gradient per term.

    Args:
        names: the terms.
        lr: of s.
        low, high: range of s, which starts at 0; -3 allows factors up to exp(3) / 2 = 10.
    """

    def __init__(self, names: Iterable[str], lr: float = 0.01, low: float = -3.0, high: float = 3.0):
        super().__init__(names)
        if not low <= 0.0 <= high:
            raise ValueError(f"s starts at 0, which must lie between low ({low}) and high ({high})")
        self.lr, self.low, self.high = lr, low, high
        self._log_variances = dict.fromkeys(self.names, 0.0)

    def weights(self) -> dict[str, float]:
        return {name: 0.5 * math.exp(-s) for name, s in self._log_variances.items()}

    def observe(self, losses: Mapping[str, float]) -> None:
        self._check(losses)
        s = torch.tensor([self._log_variances[n] for n in self.names], dtype=torch.float64, requires_grad=True)
        values = torch.tensor([losses[name] for name in self.names], dtype=torch.float64)
        (slopes,) = torch.autograd.grad(uncertainty_objective(values, s), s)
        moved = (s.detach() - self.lr * slopes).clamp(self.low, self.high)
        self._log_variances = dict(zip(self.names, moved.tolist(), strict=True))

    def _factors(self, step: int, gradients: Gradients, losses: Mapping[str, float]) -> dict[str, float]:
        applied = self.weights()
        self.observe(losses)
        return applied

    def state_dict(self) -> dict[str, dict[str, float] | None]:
        return {"log_variances": dict(self._log_variances)}

    def load_state_dict(self, state: Mapping[str, dict[str, float] | None]) -> None:
        self._log_variances = dict(state["log_variances"] or {})


BALANCERS: dict[str, Callable[..., Balancer]] = {
    "none": Balancer,
    "gradient_norm": GradientNorms,
    "gradnorm": GradNorm,
    "uncertainty": Uncertainty,
    "pcgrad": PCGrad,
    "project_kd": ProjectKD,
}
"""Mode -> what makes its balancer from the terms' names and the mode's own options."""

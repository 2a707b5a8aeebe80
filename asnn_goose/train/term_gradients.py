"""Gradients of single terms of the objective: how they are compared and added, and what a balancer of them promises.

``gradients[name]`` is the gradient of one term with its configured weight, over the parameters that the terms share (a
term's own, such as a projection or the temperature, would add a norm that nothing else has), for a whole optimiser
step: summed over micro-batches, averaged over processes, not sharded, and without the scale of a gradient scaler. None
stands for a parameter that the term does not reach. ``losses[name]`` is the value of the same weighted term. Processes
that see the same gradients and losses take the same decisions.

Every method, the projections too, comes down to one factor per term: the update is sum_n factor_n gradients[n].

A gradient per term costs one backward pass through the student per term, and memory for one more copy of the gradients
each; the fused product of head and divergence, too, runs once per term instead of once for all. On steps for which
``needs_gradients`` is false, one pass through the sum of the terms, each times ``weights()``, does the same.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from asnn_goose.kernels.precision import widened

Gradients = Mapping[str, Sequence[Tensor | None]]


def _flat(x: Tensor) -> Tensor:
    return widened(x.flatten())


def inner_products(gradients: Gradients) -> Tensor:
    """<g_i, g_j> as float64 [n, n], in the mapping's order.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    names, lists = list(gradients), list(gradients.values())
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i in range(len(names)):
        for j in range(i + 1):
            pairs = zip(lists[i], lists[j], strict=True)
            parts = [torch.dot(_flat(a), _flat(b)).double() for a, b in pairs if a is not None and b is not None]
            if parts:
                products[i, j] = products[j, i] = torch.stack(parts).sum()
    for name, square in zip(names, products.diagonal().tolist(), strict=True):
        if not math.isfinite(square):
            raise FloatingPointError(
                f"the gradient of loss term {name} is not finite: lower train.lr, or look at the batch"
            )
    return products


def weighted_sum(gradients: Gradients, factors: Mapping[str, float]) -> list[Tensor | None]:
    """sum_n factor_n gradients[n], in new tensors; None where no term reaches."""
    total: list[Tensor | None] = [None] * max(len(parts) for parts in gradients.values())
    for name, parts in gradients.items():
        for index, part in enumerate(parts):
            if part is not None:
                before = total[index]
                total[index] = factors[name] * part if before is None else before.add_(part, alpha=factors[name])
    return total


def check_reference(names: Sequence[str], reference: str) -> None:
    """Raises: ValueError: the reference is none of the terms."""
    if reference not in names:
        raise ValueError(f"the reference {reference} is not among the loss terms {list(names)}: give it a weight")


class Balancer:
    """Factors on the configured weights. This one, mode none, leaves them at 1.

    Args:
        names: the terms, in the order of their gradients.
    """

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)

    def needs_gradients(self, step: int) -> bool:
        """Whether the optimiser step calls for :meth:`factors`; otherwise :meth:`weights`, then :meth:`observe`."""
        return False

    def weights(self) -> dict[str, float]:
        """Name -> factor that is known before the step's gradients are."""
        return dict.fromkeys(self.names, 1.0)

    def observe(self, losses: Mapping[str, float]) -> None:
        """Learn from the losses of a step that had one gradient for all terms."""

    def factors(self, step: int, gradients: Gradients, losses: Mapping[str, float]) -> dict[str, float]:
        """Name -> factor to apply in this step: the update is ``weighted_sum(gradients, factors)``.

        Raises:
            KeyError: other terms than those the balancer was made for.
            ValueError: lists of gradients of unequal length.
            FloatingPointError: a loss, or a gradient that the method measures, is not finite.
        """
        self._check(losses)
        if tuple(gradients) != self.names or len({len(parts) for parts in gradients.values()}) != 1:
            given = {name: len(parts) for name, parts in gradients.items()}
            raise ValueError(f"gradients must be lists of one length for {list(self.names)} in this order, not {given}")
        return self._factors(step, gradients, losses)

    def _factors(self, step: int, gradients: Gradients, losses: Mapping[str, float]) -> dict[str, float]:
        return self.weights()

    def _check(self, losses: Mapping[str, float]) -> None:
        if set(losses) != set(self.names):
            raise KeyError(f"the balancer is for the loss terms {list(self.names)}, but {list(losses)} came")
        for name, value in losses.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"loss term {name} is {value}: lower train.lr, or look at the batch")

    def state_dict(self) -> dict[str, dict[str, float] | None]:
        """What a resumed run needs: numbers by the terms' names."""
        return {}

    def load_state_dict(self, state: Mapping[str, dict[str, float] | None]) -> None:
        """Put back what :meth:`state_dict` gave."""

"""In which precision states, probabilities and sums are computed: float32 at least, whatever the input's dtype."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """x in its :func:`wide_dtype`."""
    return x.to(wide_dtype(x.dtype))


def floating(x: Tensor) -> Tensor:
    """x, in float32 where it holds integers."""
    return x if x.is_floating_point() else widened(x)

"""Directions of vectors, with a gradient that exists everywhere."""

import torch
from torch import Tensor


def unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, and 0 without a gradient where |x| is 0 in the dtype of x; NaN where it is NaN.

    A vector of zeros, such as a token none of whose channels fired, has no direction, and the limit of the gradient,
    1 / |x|, is infinite. In float32 |x|^2 leaves the dtype's range below 1e-22 and above 1e19, which gives 0 as well.
    """
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0.0, 0.0, x / norm.clamp_min(torch.finfo(x.dtype).tiny))

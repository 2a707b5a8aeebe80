"""Linear centred kernel alignment between two sets of states of the same tokens (arXiv 1905.00414).

Shapes: n tokens, d1 and d2 channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from asnn_goose.kernels.precision import wide_dtype, widened

TINY = 1e-14
"""A denominator below it says that one side does not vary: the similarity is then 0, without gradient. Sides are scaled
to a longest row of 1 first."""

ROUNDING = 16.0
"""Deviations from the mean below so many units in the last place of the largest state are rounding."""


def _check(x_nd: Tensor, y_nd: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if x_nd.ndim != 2 or y_nd.ndim != 2 or x_nd.shape[0] != y_nd.shape[0]:
        raise ValueError(
            f"states {tuple(x_nd.shape)} and {tuple(y_nd.shape)} must be matrices with one row per token, the same "
            "tokens"
        )
    if not x_nd.shape[1] or not y_nd.shape[1]:
        raise ValueError(f"states {tuple(x_nd.shape)} and {tuple(y_nd.shape)} must have channels")
    if x_nd.shape[0] < least:
        raise ValueError(f"this needs at least {least} token{'s' if least > 1 else ''}, not {x_nd.shape[0]}")
    x_nd, y_nd = (widened(z) for z in (x_nd, y_nd))
    return x_nd, y_nd


def _product(x_nd: Tensor, y_nd: Tensor) -> Tensor:
    """|X^T Y|_F^2 = tr(K L), K = X X^T, L = Y Y^T, without an n x n matrix: costs n d1 d2."""
    return (x_nd.T @ y_nd).square().sum()


def _unbiased_product(x_nd: Tensor, y_nd: Tensor) -> Tensor:
    """HSIC_1 of the Gram matrices with zeroed diagonals K~, L~ (arXiv 2010.15327), also without forming them.

    [tr(K~ L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2 / (n-2) 1'K~L~1] / (n (n-3))
    """
    n = x_nd.shape[0]
    diagonal_x_n, diagonal_y_n = x_nd.square().sum(-1), y_nd.square().sum(-1)
    # K~ 1 = X (X^T 1) - diag(K).
    rows_x_n = x_nd @ x_nd.sum(0) - diagonal_x_n
    rows_y_n = y_nd @ y_nd.sum(0) - diagonal_y_n
    trace = _product(x_nd, y_nd) - diagonal_x_n @ diagonal_y_n
    sums = rows_x_n.sum() * rows_y_n.sum() / ((n - 1) * (n - 2))
    return (trace + sums - 2.0 / (n - 2) * (rows_x_n @ rows_y_n)) / (n * (n - 3))


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    varies = (xx > TINY) & (yy > TINY)
    # Selected before the root, whose derivative at 0 is infinite; two roots, since the product overflows float32.
    root_x, root_y = (torch.where(varies, z, 1.0).sqrt() for z in (xx, yy))
    return torch.where(varies, xy / root_x / root_y, 0.0 * xy)


def hsic(x_nd: Tensor, y_nd: Tensor, debiased: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity's numerator and both denominators (XY, XX, YY): what is averaged over minibatches.

    Columns are centred first (debiased: the estimator is free of offsets as it is).

    Raises:
        ValueError: not two matrices over the same tokens, no channel, no token, or fewer than 4 for ``debiased``.
    """
    products = _products(*_centred_sides(x_nd, y_nd, debiased), debiased)
    xy, xx, yy = (z.to(wide_dtype(x_nd.dtype)) for z in products)
    return xy, xx, yy


def _centred_sides(x_nd: Tensor, y_nd: Tensor, debiased: bool) -> tuple[Tensor, Tensor]:
    # Centred in both cases: large common offsets would leave few digits.
    x_nd, y_nd = _check(x_nd, y_nd, 4 if debiased else 1)
    return _centred(x_nd, debiased), _centred(y_nd, debiased)


def _centred(z_nd: Tensor, debiased: bool) -> Tensor:
    """Columns without their means, in float64 if ``debiased``; 0 where what is left is rounding."""
    noise_d = ROUNDING * torch.finfo(z_nd.dtype).eps * z_nd.detach().abs().amax(0)
    # Of a side with one large row, as a window's first token is, the zeroed diagonals leave only the last digits.
    z_nd = z_nd.double() if debiased else z_nd
    centred_nd = z_nd - z_nd.mean(0)
    return centred_nd.masked_fill(centred_nd.detach().abs().amax(0) <= noise_d, 0.0)


def _products(x_nd: Tensor, y_nd: Tensor, debiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    product = _unbiased_product if debiased else _product
    with torch.autocast(x_nd.device.type, enabled=False):
        return product(x_nd, y_nd), product(x_nd, x_nd), product(y_nd, y_nd)


def _scale(sides: Iterable[Tensor]) -> Tensor:
    """The longest row of one side over all batches: divided by it, squares of squares stay within float32."""
    longest = torch.stack([torch.linalg.vector_norm(z_nd.detach().double(), dim=-1).max() for z_nd in sides]).max()
    return torch.where(longest > 0, longest, 1.0)


def linear_cka(x_nd: Tensor, y_nd: Tensor, debiased: bool = False) -> Tensor:
    """|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) of the centred columns, in [0, 1]; 0 where a side does not vary.

    Unchanged by rotations, by one positive scale, by offsets of columns, and by a common order of the rows. With few
    tokens and wide states the plain value is near 1 for independent ones; ``debiased`` (HSIC_1) has expectation 0
    there, and can be negative.

    Args:
        x_nd, y_nd: the same n tokens, padding dropped; computed in float32 at least, ``debiased`` in float64.

    Raises:
        ValueError: see :func:`hsic`.
    """
    return minibatch_cka([(x_nd, y_nd)], debiased)


def minibatch_cka(parts: list[tuple[Tensor, Tensor]], debiased: bool = True) -> Tensor:
    """CKA over several batches: numerators and denominators averaged apart, then the ratio (arXiv 2010.15327).

    The mean of the batches' ratios is another, biased number.
    """
    if not parts:
        raise ValueError("minibatch_cka needs at least one batch")
    centred = [_centred_sides(x_nd, y_nd, debiased) for x_nd, y_nd in parts]
    scale_x, scale_y = (_scale(sides) for sides in zip(*centred, strict=True))
    products = [_products(x_nd / scale_x, y_nd / scale_y, debiased) for x_nd, y_nd in centred]
    sums = [torch.stack(terms).mean() for terms in zip(*products, strict=True)]
    return _ratio(sums[0], sums[1], sums[2]).to(wide_dtype(parts[0][0].dtype))

"""Student's t, Welch's t and Holm's correction; on logarithms what comes back is exponentiated, a ratio."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t


class Estimate(NamedTuple):
    """A mean, or exp of a mean of logarithms or of the difference of two."""

    value: float
    low: float | None
    """Lower end of the 95 % t-interval, None where there are too few values for one."""
    high: float | None
    p_value: float | None
    """Two-sided t-test of a mean, or of a logarithm, of 0, None like the interval."""


def mean_of(values_N: np.ndarray) -> Estimate:
    """mean +- t_0.975(N - 1) s / sqrt(N), and the p of t = mean / (s / sqrt(N)); no interval where N = 1."""
    n, mean = len(values_N), float(values_N.mean())
    if n == 1:
        return Estimate(mean, None, None, None)
    return _estimate(mean, float(values_N.std(ddof=1)) / math.sqrt(n), n - 1)


def one_sample(logs_N: np.ndarray) -> Estimate:
    """:func:`mean_of` logarithms, exponentiated."""
    return _exponentiated(mean_of(logs_N))


def welch(logs_N: np.ndarray, others_M: np.ndarray) -> Estimate:
    """exp of the difference of two means, of samples that are not paired and may differ in their spread.

    With a = s_N^2 / N and b = s_M^2 / M the standard error is sqrt(a + b), and t has (a + b)^2 / (a^2 / (N - 1) + b^2 /
    (M - 1)) degrees of freedom (Welch 1947). No interval where N = 1 or M = 1.
    """
    n, m, difference = len(logs_N), len(others_M), float(logs_N.mean() - others_M.mean())
    if min(n, m) == 1:
        return Estimate(_exp(difference), None, None, None)
    a, b = float(logs_N.var(ddof=1)) / n, float(others_M.var(ddof=1)) / m
    # Two samples without spread have no degrees of freedom of their own, and an interval without width at any number.
    freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1)) if a + b else n + m - 2
    return _exponentiated(_estimate(difference, math.sqrt(a + b), freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values, in the order given: max over j <= i of min(1, (m - j + 1) p_(j)).

    Rejecting where the adjusted value is below alpha keeps the chance of any false rejection below alpha, whatever the
    dependence between tests (Holm 1979).

    Raises:
        ValueError: a value outside [0, 1].
    """
    if bad := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"a p-value must be within [0, 1], not {bad[0]}")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    scaled = (min(1.0, (len(order) - place) * p_values[i]) for place, i in enumerate(order))
    adjusted = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [adjusted[i] for i in range(len(p_values))]


def first_to_pass(alpha: float, comparisons: int, n: int) -> float:
    """|t| of n values from which on the smallest of m p-values is below alpha after :func:`holm`.

    t_{1 - alpha / 2m}(n - 1), in standard errors of the mean.
    """
    return float(student_t.isf(alpha / (2 * comparisons), n - 1))


def _estimate(mean: float, error: float, freedom: float) -> Estimate:
    half = float(student_t.ppf(0.975, freedom)) * error
    # Values that are all equal leave t = mean / 0.
    p_value = 2 * float(student_t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, p_value)


def _exponentiated(estimate: Estimate) -> Estimate:
    value, low, high, p_value = estimate
    return Estimate(_exp(value), None if low is None else _exp(low), None if high is None else _exp(high), p_value)


def _exp(value: float) -> float:
    """exp, infinite where two seeds far apart make an interval that no float holds."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))

"""A mean and its interval. Free of SciPy, whose import costs more than all else of a command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return a mean and its two-sided 95% interval by Student's t.

    Parameters
    ----------
    values : sequence of float
        At least one.

    Returns
    -------
    mean, low, high : float
        ``mean -+ t(0.975, n - 1) s / sqrt(n)``; low and high are None for a
        single value.

    Raises
    ------
    ValueError
        If there is no value.
    """
    count = len(values)
    if not count:
        raise ValueError("no values: an interval needs at least one")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student_t(count - 1) * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


@lru_cache
def student_t(freedom: int) -> float:
    """Return t(0.975, freedom): within it lie 95% of Student's distribution.

    Bisection on the closed form for whole degrees of freedom (Abramowitz & Stegun,
    26.7.3 and 26.7.4), in the angle ``atan(t / sqrt(freedom))``.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """Return the probability that ``|t| <= sqrt(freedom) tan(angle)``."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    series = 0.0
    for power in range(odd, freedom - 1, 2):
        series += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * series)
    return math.sin(angle) * series

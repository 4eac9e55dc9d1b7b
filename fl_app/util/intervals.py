"""Means and their intervals. Free of SciPy, whose import costs more than all else of a command.

An interval says how a mean would differ on other draws: other trials, clients or rounds. The
images of one client are no such draws, so what is said of them is how they are spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypedDict

FEWEST = 5
"""Draws from which on a mean has an interval; of fewer the values themselves are said."""

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-math.inf, math.inf)
SHARE: Bounds = (0.0, 1.0)
PERCENT: Bounds = (0.0, 100.0)
COSINE: Bounds = (-1.0, 1.0)
DISTANCE: Bounds = (0.0, math.inf)


class Spread(TypedDict):
    """A mean over draws.

    Attributes
    ----------
    mean : float
    low, high : float or None
        Its 95% interval; None below `FEWEST` draws.
    values : sequence of float
        Of the draws.
    """

    mean: float
    low: float | None
    high: float | None
    values: Sequence[float]


def spread(values: Sequence[float], bounds: Bounds = UNBOUNDED) -> Spread:
    """Return the mean over draws and its 95% interval, see `mean_interval`.

    Parameters
    ----------
    values : sequence of float
        At least one.
    bounds : tuple of float
        What a value can be at least and at most: ends beyond are cut there, since the mean
        can't be beyond either, and the interval still holds it in 95% of the cases.

    Raises
    ------
    ValueError
        If there is no value.
    """
    mean, low, high = mean_interval(values)
    if low is None or high is None or len(values) < FEWEST:
        low = high = None
    else:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Spread(mean=mean, low=low, high=high, values=list(values))


def spread_words(found: Mapping[str, Any], digits: int, sign: str = "") -> str:
    """Return a `Spread` in words.

    ``2.0 ± 0.3``; ``0.9 [0.7, 1.0]`` where an end was cut; ``2.0 (1.0, 3.0)``, the draws
    themselves, below `FEWEST` of them; ``2.0`` for one.

    Parameters
    ----------
    found : mapping
    digits : int
        After the point.
    sign : {"", "+"}
        "+": a positive number shows its sign.
    """

    def said(values: Sequence[float]) -> str:
        return ", ".join(f"{value:{sign}.{digits}f}" for value in values)

    mean, low, high, values = (found[name] for name in ("mean", "low", "high", "values"))
    if low is None or high is None:
        return said([mean]) + (f" ({said(values)})" if len(values) > 1 else "")
    if math.isclose(high - mean, mean - low, rel_tol=1e-6, abs_tol=1e-12):
        return f"{said([mean])} ± {high - mean:.{digits}f}"
    return f"{said([mean])} [{said([low, high])}]"


def with_interval(values: Sequence[float], digits: int, bounds: Bounds = UNBOUNDED) -> str:
    """Return the mean over draws in words, see `spread` and `spread_words`."""
    return spread_words(spread(values, bounds), digits)


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

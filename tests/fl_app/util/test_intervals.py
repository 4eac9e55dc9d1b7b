"""Means with their intervals, without SciPy: the same as with it."""

from __future__ import annotations

import math

import pytest
from scipy.special import stdtrit

from fl_app.util.intervals import mean_interval, student_t


def test_interval_is_students_t() -> None:
    # Three values, s = 1, t(0.975, 2) = 4.302653.
    mean, low, high = mean_interval([1, 2, 3])
    assert (mean, low, high) == pytest.approx(
        (2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5
    )
    assert mean_interval([5.0]) == (5.0, None, None)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_its_quantile_is_scipys() -> None:
    for freedom in (*range(1, 12), 63, 100, 999):
        assert student_t(freedom) == pytest.approx(float(stdtrit(freedom, 0.975)), rel=1e-12)

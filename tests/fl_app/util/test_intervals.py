"""Means with their intervals, without SciPy: the same as with it."""

from __future__ import annotations

import math

import pytest
from scipy.special import stdtrit

from fl_app.audit.exposure import bounds_of
from fl_app.util.intervals import (
    FEWEST,
    mean_interval,
    spread,
    spread_words,
    student_t,
    with_interval,
)


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


def test_an_interval_needs_draws_and_stays_within_its_bounds() -> None:
    draws = [0.99, 1.0, 0.6, 1.0, 1.0]
    mean, low, high = mean_interval(draws)
    assert high is not None and high > 1  # as SSIM's was
    found = spread(draws, bounds_of("ssim"))
    assert (found["mean"], found["low"], found["high"]) == (mean, low, 1.0)
    assert spread_words(found, 2) == f"0.92 [{low:.2f}, 1.00]"
    assert spread([0.0, 0.0, 0.0, 0.0, 1.0], bounds_of("lpips_vgg"))["low"] == 0
    assert spread(draws)["high"] == high
    assert with_interval([1, 2, 3, 2, 2], 1) == "2.0 ± 0.9"
    # Below five draws the values themselves, and of one that value.
    few = spread(draws[: FEWEST - 1], bounds_of("ssim"))
    assert few["low"] is few["high"] is None and few["values"] == draws[:4]
    assert with_interval([3, 1], 2) == "2.00 (3.00, 1.00)"
    assert spread_words(spread([3.0, -1.0]), 1, "+") == "+1.0 (+3.0, -1.0)"
    assert with_interval([0.5], 1) == "0.5"
    # The same value throughout is no cut interval.
    assert with_interval([1.0] * 5, 1, bounds_of("ssim")) == "1.0 ± 0.0"

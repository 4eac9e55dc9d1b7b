"""Which units the images of a step open, by products that agree.

A step's gradient is ``sum_n d_ni a_nj`` over its images. Where one image alone has the
input and opens the unit, the logarithm of its size is a sum ``log |d_ni| + log a_nj``. So
two units differ by the same number on all inputs that one image alone has, and by another
number on those of another image. Inputs that agree in a pair of units are the start of an
image, to which further units and inputs are added as long as they agree, and strays are
left out (random sample consensus, Fischler & Bolles, 1981).
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_AGREE = 0.03  # difference of logarithms up to which they agree
_PARTNERS = 40  # units that share most inputs with one, as pairs to start from
_START = 8  # inputs that agree in a pair, at the least
_TURNS = 5
_UNIT, _UNIT_SHARE = 5, 0.35  # inputs that agree with an image's, for a unit of it
_INPUT, _INPUT_SHARE = 2, 0.5  # units that agree, for an input
_LEAST = 60  # coordinates of an image, at the least
_TRIES = 4  # starts that may lead nowhere


def opened_units(
    sizes: Floats, signs: Floats, known: Mask, count: int, until: float = math.inf
) -> Mask:
    """Return the units that each of a step's images opens, shape (m, R); m is `count` at most.

    Parameters
    ----------
    sizes : array, shape (R, C)
        Logarithms of the gradient's sizes, by unit and input.
    signs : array, shape (R, C)
        Of the gradient.
    known : array of bool, shape (R, C)
        Where it is known.
    count : int
        The step's images.
    until : float
        By `time.monotonic`, after which no more images are looked for.
    """
    found: list[Mask] = []
    left, failed = known.copy(), 0
    while len(found) < count and failed < _TRIES and time.monotonic() < until:
        start = _start(sizes, signs, left)
        if start is None:
            break
        units, explained = _grown(sizes, signs, left, *start)
        if explained.sum() < _LEAST:
            left[start[0]] &= ~left[start[1]]
            failed += 1
            continue
        left &= ~explained
        found.append(units)
    return np.stack(found) if found else np.zeros((0, len(sizes)), dtype=np.bool_)


def _start(sizes: Floats, signs: Floats, known: Mask) -> tuple[int, int, float, float] | None:
    """Return the two units with most inputs that agree: both, sign and difference."""
    shared = known.astype(np.float64) @ known.T
    np.fill_diagonal(shared, 0)
    best, most = None, _START - 1
    for first, row in enumerate(shared):
        for second in np.argsort(-row)[:_PARTNERS]:
            if row[second] <= most:
                break
            both = known[first] & known[second]
            for sign in (1.0, -1.0):
                here = both & (signs[first] * signs[second] == sign)
                difference, agree = _mode((sizes[first] - sizes[second])[here])
                if agree > most:
                    best, most = (first, int(second), sign, difference), agree
    return best


def _grown(
    sizes: Floats, signs: Floats, known: Mask, first: int, second: int, sign: float, apart: float
) -> tuple[Mask, Mask]:
    """Return the units of the image that two units have in common, and what it explains."""
    agree = known[first] & known[second] & (signs[first] * signs[second] == sign)
    agree &= np.abs(sizes[first] - sizes[second] - apart) < _AGREE
    inputs = np.where(agree, (sizes[first] + sizes[second] + apart) / 2, np.nan)
    for _ in range(2):
        opened, explained, inputs = _settled(sizes, signs, known, inputs)
        # Two images may differ alike in the first two units, but not in a third one.
        count = explained.sum(1)
        count[[first, second]] = 0
        inputs = np.where(explained[count.argmax()], inputs, np.nan)
    return opened, explained


def _settled(
    sizes: Floats, signs: Floats, known: Mask, inputs: Floats
) -> tuple[Mask, Mask, Floats]:
    """Return units, what they explain, and inputs, by adding those that agree in turns."""
    units, of = np.full(len(sizes), np.nan), np.zeros(len(sizes))
    for _ in range(_TURNS):
        there = ~np.isnan(inputs)
        both = known & there
        best = np.zeros(len(sizes))
        units, of = np.full(len(sizes), np.nan), np.zeros(len(sizes))
        off = sizes - np.where(there, inputs, 0)
        enough = np.maximum(_UNIT, _UNIT_SHARE * both.sum(1))
        for one in (1.0, -1.0):  # features are not negative: a unit's signs are its slope's
            value, count = _modes(off, both & (signs == one))
            better = (count >= enough) & (count > best)
            units[better], of[better], best[better] = value[better], one, count[better]
        open_ = ~np.isnan(units)
        both = known & open_[:, None]
        off = sizes - np.where(open_, units, 0)[:, None]
        value, count = _modes(off.T, (both & (signs == of[:, None])).T)
        enough = np.maximum(_INPUT, _INPUT_SHARE * both.sum(0))
        inputs = np.where(count >= enough, value, np.nan)
    off = np.abs(sizes - units[:, None] - inputs)
    explained: Mask = known & (signs == of[:, None]) & (off < 2 * _AGREE)
    opened: Mask = ~np.isnan(units)
    return opened, explained, inputs


def _modes(values: Floats, mask: Mask) -> tuple[Floats, Floats]:
    """Return by row the value that most others agree with, and how many do."""
    pairs = [_mode(row[here]) for row, here in zip(values, mask, strict=True)]
    return np.array([value for value, _ in pairs]), np.array([float(count) for _, count in pairs])


def _mode(values: Floats) -> tuple[float, int]:
    if not len(values):
        return 0.0, 0
    ordered = np.sort(values)
    ends = np.searchsorted(ordered, ordered + 2 * _AGREE, "right")
    counts = ends - np.arange(len(ordered))
    start = int(counts.argmax())
    return float(ordered[(start + ends[start] - 1) // 2]), int(counts[start])

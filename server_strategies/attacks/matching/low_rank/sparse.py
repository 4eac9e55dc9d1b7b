"""Separating the terms of a low-rank update by the ReLU behind its layer.

The slopes d_n of an image are zero wherever it leaves a unit closed, at about half of the
units. So in the column space ``d = U q`` those of the terms are the vectors with the most
zeros. N - 1 rows that one of them leaves zero determine it: q is their null vector. Rows
are drawn at random until such ones are hit, as in SPEAR (Dimitrov et al., NeurIPS 2024),
there for one step's gradient. The chance of a hit falls like 2^-N, so this reaches about
a dozen images; `vertices` reaches more where it applies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from server_strategies.attacks.matching.low_rank.spectrum import Matrix, Spectrum
from server_strategies.attacks.matching.low_rank.vertices import ALONE, leverage

_SHARE = 0.45  # zeros among the live units, as they are mostly at least
_MOST = 400_000  # draws of rows, within some seconds
_AT_ONCE = 4_000
_ZERO = 6.0  # deviations of the noise within which a slope is zero
_OVER = 1.25  # zeros over those that the rows of a draw are
_TRIED = 4  # vectors of a batch of draws, for each term, that are looked at
_FEWEST = 0.15  # share of the live units that a term leaves zero at least


def draws_needed(rank: int, rows: int) -> float:
    """Return the draws that are expected until every term is hit: its chance by rows and zeros.

    ``prod_(i < N - 1) (z - i) / (L - i)`` for z zeros among L live rows.

    Parameters
    ----------
    rank : int
        N.
    rows : int
        L.
    """
    zeros = _SHARE * rows
    if zeros <= rank:
        return math.inf
    hit = math.prod((zeros - i) / (rows - i) for i in range(rank - 1))
    return (math.log(rank) + 1) / hit if hit else math.inf


def separate_sparse(seen: Spectrum, seed: int = 0) -> Matrix:
    """Return the places r of the terms' features, shape (m, r), as `separate_bounded` does.

    Parameters
    ----------
    seen : Spectrum
    seed : int
        Of the draws.
    """
    rank = seen.rank
    live = seen.left[np.abs(seen.left).max(1) > 1e-9]
    needed = draws_needed(rank, len(live))
    if rank < 2 or needed > _MOST:
        return np.zeros((0, rank))
    # Of U q for q of length 1: its rows are off by the noise over the least singular value.
    tolerance = _ZERO * seen.entry_noise / seen.sizes[-1]
    generator = np.random.default_rng(seed)
    found: list[_Term] = []
    drawn = 0
    while drawn < min(_MOST, 8 * needed + _AT_ONCE) and (len(found) < rank or drawn < needed):
        drawn += _AT_ONCE
        rows = generator.random((_AT_ONCE, len(live))).argpartition(rank - 1, axis=1)
        _, _, right = np.linalg.svd(live[rows[:, : rank - 1]])
        null = right[:, -1]
        zeros = (np.abs(null @ live.T) < tolerance).sum(1)
        least = max(_OVER * rank, _FEWEST * len(live))
        tried = 0
        for place in np.argsort(-zeros):
            if zeros[place] < least or tried == _TRIED * rank:
                break
            better = [term for term in found if term.zeros >= zeros[place]]
            if _independent(null[place], better):
                tried += 1
                new = _refined(live, null[place], tolerance)
                if new.zeros >= least:
                    found = _chosen([*found, new])
    if len(found) < rank:
        return np.zeros((0, rank))
    # D = U Q, so U S V' = D [A, 1]' gives [A, 1]' = Q^-1 S V': the bias's column is the scale.
    places = np.linalg.inv(np.stack([term.q for term in found], 1)) * seen.sizes
    scales = places @ seen.bias
    if (np.abs(scales) < 1e-9 * np.linalg.norm(places, axis=1)).any():
        return np.zeros((0, rank))
    scaled: Matrix = places / scales[:, None]
    return scaled


@dataclass(frozen=True)
class _Term:
    """A null vector q of rows, and the number of these; 0: it is a blend."""

    q: Matrix
    zeros: int


def _chosen(terms: list[_Term]) -> list[_Term]:
    """Return those with the most zeros: a blend has fewer than each of its images."""
    kept: list[_Term] = []
    for term in sorted(terms, key=lambda term: -term.zeros):
        if _independent(term.q, kept):
            kept.append(term)
    return kept


def _refined(live: Matrix, q: Matrix, tolerance: float) -> _Term:
    """Return a null vector of all rows that are zero.

    A blend of two images is zero wherever both leave a unit closed, but the share of each is
    held by a single row.
    """
    for _ in range(3):
        zero = np.abs(live @ q) < tolerance
        if zero.sum() < len(q):
            break
        q = np.linalg.svd(live[zero], full_matrices=False)[2][-1]
    zero = np.abs(live @ q) < tolerance
    if zero.sum() < len(q) or leverage(live[zero], q) > ALONE:
        return _Term(q, 0)
    return _Term(q, int(zero.sum()))


def _independent(q: Matrix, terms: list[_Term]) -> bool:
    """Return whether q is not in the span of others."""
    if not terms:
        return True
    basis = np.linalg.qr(np.stack([term.q for term in terms], 1))[0]
    return bool(np.linalg.norm(q - basis @ (basis.T @ q)) > 1e-2)

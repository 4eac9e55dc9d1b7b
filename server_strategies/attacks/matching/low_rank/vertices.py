"""Separating the terms of a low-rank update by the bounds of its layer's inputs.

The features a_n of an image lie in the update's row space, ``a_n = V r_n``, with the
bias's coordinate 1. Behind a ReLU no feature is negative, and in front of a first layer
no pixel leaves its range. So every r_n is in the polytope ``{r : V r >= low, v_b' r =
1}``. Where an image's features are zero, a third to two thirds of them, it lies on the
polytope's faces: far more of them meet there than it takes for a vertex. So every r_n is
a vertex, and the one of least ``c' r`` follows by linear programming: for c at random it
is nearly always one of the r_n, since the more faces meet at a vertex, the more c lead
there. With c orthogonal to the vertices that are known, the next one is another.

Such factors are those of a non-negative matrix factorisation, which is unique where each
image has features that no other one has (Donoho & Stodden, NIPS 2003). In SPEAR (Dimitrov
et al., NeurIPS 2024) terms are separated by the other factor, see `sparse`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from server_strategies.attacks.matching.low_rank.spectrum import Matrix, Spectrum

_MISSES = 6  # draws of c in a row that lead to no new vertex, after which the search ends
_FIRST = 12  # constraints of a programme for each of its unknowns, at the start
_ADDED = 200  # constraints that are added at once, the most violated ones
_SLACK = 6.0  # deviations of the noise by which a constraint may be violated
_TIE = 30.0  # of that slack, within which two vertices are as low
_ON_FACE = 12.0  # deviations within which a feature counts as at its bound
_FACES = 3  # faces that meet at a term's vertex, for each that it takes
_BESIDE = 0.1  # relative distance within which a vertex may be another one's shadow
_SHADOW = 0.95  # share of the other's faces below which it is
_SAME = 20.0  # deviations of the noise within which two vertices are one
_SHRINK = 3.0  # factor by which the tolerance falls from one refinement to the next
_HELD = 5.0  # deviations of the noise by which a vertex has to be held in each direction
ALONE = 0.9
"""Leverage from which a face holds a vertex alone in some direction."""


def separate_bounded(
    seen: Spectrum,
    low: float | Matrix,
    high: float | Matrix | None = None,
    seed: int = 0,
    until: float = math.inf,
) -> Matrix:
    """Return the vertices that are terms' features, as their coordinates r, shape (m, r).

    Parameters
    ----------
    seen : Spectrum
    low : float or array, shape (in,)
        Greatest lower bound of the layer's inputs.
    high : float or array, shape (in,), optional
        Least upper bound; None: there is none.
    seed : int
        Of the draws of c.
    until : float
        When the search ends in any case, in seconds of `time.monotonic`.

    Returns
    -------
    array, shape (m, r)
        ``m <= r``; the features are ``right @ r``, and ``bias @ r`` is 1.
    """
    if seen.rank == 1:  # a single term is the row space
        return 1 / seen.bias[None]
    faces = seen.right - np.outer(np.broadcast_to(low, len(seen.right)), seen.bias)
    if high is not None:
        upper = np.outer(np.broadcast_to(high, len(seen.right)), seen.bias) - seen.right
        faces = np.concatenate([faces, upper])
    # A feature that is at its bound for every image is no face.
    sizes = np.linalg.norm(faces, axis=1)
    faces = faces[sizes > 1e-9 * sizes.max()]
    programme = _Programme(faces, seen)
    generator = np.random.default_rng(seed)
    found: list[_Vertex] = []
    misses = 0
    while len(found) < seen.rank and misses < _MISSES and time.monotonic() < until:
        direction = generator.standard_normal(seen.rank)
        if found:
            known = np.linalg.qr(np.stack([vertex.place for vertex in found], 1))[0]
            direction -= known @ (known.T @ direction)
        # On one side of the known ones there are others.
        before = len(found)
        for sign in (1, -1):
            vertex = programme.vertex(sign * direction, known=bool(found))
            if vertex is not None:
                found = _with(found, vertex)
            if len(found) > before:
                break
        misses = 0 if len(found) > before else misses + 1
    return np.stack([vertex.place for vertex in found]) if found else np.zeros((0, seen.rank))


@dataclass(frozen=True)
class _Vertex:
    """A vertex: where it is, how many faces meet there, and how far noise moves its features."""

    place: Matrix
    faces: int
    noise: float


def _with(found: list[_Vertex], new: _Vertex) -> list[_Vertex]:
    """Return the vertices with a new one, if it is none of them, nor the shadow of one.

    Noise cuts off the corner at a term's vertex: beside it there may be another, on fewer
    faces. Two true ones may be as near, such as those of one image in two passes over the
    data, but as many faces meet there.
    """
    kept = []
    for old in found:
        apart = float(np.linalg.norm(old.place - new.place))
        if apart > _BESIDE * np.linalg.norm(new.place):
            kept.append(old)
        elif new.faces < _SHADOW * old.faces or apart < _SAME * max(old.noise, new.noise):
            return found
        elif old.faces >= _SHADOW * new.faces:
            kept.append(old)
    return [*kept, new]


class _Programme:
    """Linear programmes over one polytope, each with few of its faces at first."""

    def __init__(self, faces: Matrix, seen: Spectrum) -> None:
        self.faces, self.bias, self.rank = faces, seen.bias, seen.rank
        self.width = len(seen.right)
        # What noise does to a feature V r: its singular vectors are off by it over s.
        self.noise = seen.entry_noise / seen.sizes
        # r has a length of the features', whose least is that of v_b' r = 1.
        typical = 2 / np.linalg.norm(seen.bias)
        self.slack = _SLACK * float(np.linalg.norm(self.noise)) * typical / seen.rank**0.5
        first = _FIRST * seen.rank
        order = np.random.default_rng(0).permutation(len(faces))
        self.kept = order[:first]

    def vertex(self, direction: Matrix, known: bool = False) -> _Vertex | None:
        """Return the vertex of least ``direction' r``, refined; None: it is no term's.

        Parameters
        ----------
        direction : array, shape (r,)
        known : bool
            Whether vertices are known; `direction` is orthogonal to them, so that 0 is theirs,
            and where nothing is below there is no other one on this side.
        """
        while True:
            solved = self._solved(direction)
            # Unbounded by these faces: the vertex is far away.
            far = -direction * 1e3 / np.linalg.norm(direction)
            values = self.faces @ (far if solved is None else solved)
            outside = np.flatnonzero(values < -1.5 * self.slack)
            outside = np.setdiff1d(outside, self.kept, assume_unique=True)
            if not len(outside):
                if solved is None or (known and direction @ solved > -_TIE * self.slack):
                    return None
                return self._refined(solved)
            worst = outside[np.argsort(values[outside])[:_ADDED]]
            self.kept = np.concatenate([self.kept, worst])

    def _solved(self, direction: Matrix) -> Matrix | None:
        """Return the r of least ``direction' r`` on the faces that are kept; None: there is none.

        By the dual programme, ``max z - slack 1'y`` with ``F'y + z v_b = direction`` and ``y >=
        0``: its basis has as many rows as r, not as many as there are faces. Its multipliers
        are r.
        """
        kept = self.faces[self.kept]
        dual = linprog(
            np.append(np.full(len(kept), self.slack), -1.0),
            A_eq=np.column_stack([kept.T, self.bias]),
            b_eq=direction,
            bounds=[(0, None)] * len(kept) + [(None, None)],
            method="highs-ds",
            options={"presolve": False},  # slower than the programme itself
        )
        return -dual.eqlin.marginals if dual.status == 0 else None

    def _refined(self, vertex: Matrix) -> _Vertex | None:
        """Return a vertex by all its faces, by least squares; None: it is no term's.

        The faces within a tolerance that falls to the noise's meet in one point, up to the
        noise. A vertex of blended images is held in some direction by single faces, by as
        many as it takes, where a term's is held by hundreds.
        """
        tolerance = _ON_FACE / _SLACK * self.slack
        while True:
            on = self.faces[np.abs(self.faces @ vertex) < tolerance]
            if len(on) < _FACES * self.rank:
                return None
            # Where the faces meet is their null direction.
            squares, directions = np.linalg.eigh(on.T @ on)
            scale = self.bias @ directions[:, 0]
            if abs(scale) < 1e-12:
                return None
            vertex = directions[:, 0] / scale
            least = max(_ON_FACE * float(np.linalg.norm(self.noise * vertex)), 1e-9)
            if tolerance <= least:
                break
            tolerance = max(least, tolerance / _SHRINK)
        # An edge between two vertices is held across itself alone.
        moved = len(on) * (np.linalg.norm(self.noise[:, None] * directions, axis=0) ** 2)[1:]
        if (squares[1:] < _HELD**2 * moved).any():
            return None
        # A face's leverage is 1 where nothing else holds the vertex in some direction.
        if leverage(on, vertex) > ALONE:
            return None
        noise = float(np.linalg.norm(self.noise * vertex)) * self.width**0.5
        return _Vertex(vertex, len(on), noise)


def leverage(faces: Matrix, vertex: Matrix) -> float:
    """Return the greatest leverage of a face, in [0, 1], in the directions away from a vertex."""
    away = np.linalg.svd(vertex[None])[2][1:]
    _, directions = np.linalg.eigh(away @ faces.T @ faces @ away.T)
    within = faces @ away.T @ directions
    return float((within**2 / np.maximum((within**2).sum(0), 1e-300)).sum(1).max())

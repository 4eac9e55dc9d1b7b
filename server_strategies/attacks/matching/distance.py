"""Distances of a simulated update from the observed one.

Every distance is relative to the observed vector. So the weight of a prior means the
same for every learning rate of the client, and a candidate of zero is at distance 1.
The published distances that are not relative differ by a constant factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from server_strategies.attacks.matching.defended import Consistent, noise_part
from server_strategies.attacks.matching.outer_products import OuterSum


class Distance(ABC):
    """Distance of a candidate vector a from the observed vector b, in one piece a parameter.

    Parameters
    ----------
    seen : sequence of Tensor
        The observed vector b, one tensor a parameter.
    masks : sequence of Tensor of bool, optional
        Which coordinates count, in both vectors; in the same pieces as `seen`.
    known : Consistent, optional
        The updates consistent with b, where the client is known to have defended it:
        a is then compared with the nearest of them.

    Raises
    ------
    ValueError
        If b is zero wherever it counts.
    """

    name: str

    def __init__(
        self,
        seen: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        known: Consistent | None = None,
    ) -> None:
        self._masks, self._known = masks, known
        self._seen = self._masked(seen)
        if not any(part.any() for part in self._seen):
            raise ValueError("the update is zero: the client returned what it was sent")

    def __call__(self, candidate: Sequence[Tensor | OuterSum]) -> Tensor:
        """Return the distance, shape (), of a candidate vector a, in the same pieces."""
        if not (self._known or self._masks):
            return self._from(candidate)
        formed = dense(candidate)
        if self._known:
            formed = self._known.as_observed(formed)
        return self._from(self._masked(formed))

    @classmethod
    def at_truth(cls, noise: float) -> float:
        """Return the distance of the true update from b, where b holds noise.

        About the noise's share of b's square, since noise is orthogonal to the update.

        Parameters
        ----------
        noise : float
            That share, in [0, 1].
        """
        return noise

    @abstractmethod
    def _from(self, candidate: Sequence[Tensor | OuterSum]) -> Tensor:
        """Return the distance of a candidate that is already masked."""
        ...

    def _masked(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._masks is None:
            return vector
        return [part * mask for part, mask in zip(vector, self._masks, strict=True)]


class CosineDistance(Distance):
    """``1 - <a, b> / (|a| |b|)`` over all parameters as one vector, in [0, 2].

    Where b is known to hold noise, the distance that the noise causes is subtracted:
    the ground truth is at about 0, and candidates that fit the noise too are below.

    Parameters are `Distance`'s.
    """

    name = "cosine"

    @classmethod
    def at_truth(cls, noise: float) -> float:
        """See `Distance`; ``1 - sqrt(1 - noise)``."""
        return 1 - (1 - noise) ** 0.5

    @cached_property
    def _norm(self) -> Tensor:
        return norm(self._seen)

    @cached_property
    def _best(self) -> float:
        """The cosine of the true update and b."""
        if not self._known or not self._known.sigma:
            return 1.0
        size = torch.cat([part.flatten() for part in self._known.seen])
        return 1 - self.at_truth(noise_part(size, self._known.sigma))

    def _from(self, candidate: Sequence[Tensor | OuterSum]) -> Tensor:
        dots = [_dot(a, b) for a, b in zip(candidate, self._seen, strict=True)]
        return self._best - torch.stack(dots).sum() / (norm(candidate) * self._norm)


class SquaredDistance(Distance):
    """``sum_l |a_l - b_l|^2 / sum_l |b_l|^2`` over parameters l (Zhu et al., 2019).

    Parameters are `Distance`'s.
    """

    name = "squared"

    def _from(self, candidate: Sequence[Tensor | OuterSum]) -> Tensor:
        pairs = zip(candidate, self._seen, self._seen_squares, strict=True)
        apart = torch.stack([_apart(a, b, square) for a, b, square in pairs])
        return self._size(apart) / self._size(self._seen_squares.to(apart))

    @cached_property
    def _seen_squares(self) -> Tensor:
        return torch.stack([part.double().square().sum() for part in self._seen])

    def _size(self, squares: Tensor) -> Tensor:
        """Return the size, shape (), that the distance is a ratio of.

        Parameters
        ----------
        squares : Tensor, shape (pieces,)
            Squared norm of each piece.
        """
        return squares.sum()


class LayeredDistance(SquaredDistance):
    """``sum_l |a_l - b_l| / sum_l |b_l|``, the norms not squared (Yin et al., 2021).

    Parameters are `Distance`'s.
    """

    name = "layered"

    def _size(self, squares: Tensor) -> Tensor:
        # Rounding can make the square of a sum of outer products less than 0.
        return (squares.clamp_min(0) + 1e-30).sqrt().sum()


class DecayingDistance(SquaredDistance):
    """``sum_l e^-l |a_l - b_l|^2 / sum_l e^-l |b_l|^2``, l from 0 (Dimitrov et al., 2022).

    Parameters are `Distance`'s.
    """

    name = "decaying"

    def _size(self, squares: Tensor) -> Tensor:
        return (squares * torch.exp(-torch.arange(len(squares))).to(squares)).sum()


class EvenDistance(SquaredDistance):
    """``sum_l w_l |a_l - b_l|^2 / sum_l w_l |b_l|^2``, ``w_l = 1 / (|b_l|^2 + 1e-6 |b|^2)``.

    Each parameter counts alike, however large its update. In a deep model the layers
    next to the pixels are a few percent of the update, which the other distances hardly
    see. The floor ignores parameters whose gradient is only rounding, such as a bias in
    front of a LayerNorm.

    Parameters are `Distance`'s.
    """

    name = "even"

    @cached_property
    def _weights(self) -> Tensor:
        return 1 / (self._seen_squares + 1e-6 * self._seen_squares.sum())

    def _size(self, squares: Tensor) -> Tensor:
        return (self._weights.to(squares) * squares).sum()


DISTANCES: dict[str, type[Distance]] = {
    kind.name: kind
    for kind in (CosineDistance, SquaredDistance, LayeredDistance, DecayingDistance, EvenDistance)
}


def dense(vector: Sequence[Tensor | OuterSum]) -> list[Tensor]:
    """Return a vector with all its pieces formed."""
    return [part.dense() if isinstance(part, OuterSum) else part for part in vector]


def norm(vector: Sequence[Tensor | OuterSum]) -> Tensor:
    """Return the L2 norm, shape (), of a vector in pieces; differentiable at zero too."""
    squares = [
        part.square().to(part.inputs) if isinstance(part, OuterSum) else part.square().sum()
        for part in vector
    ]
    # The constant keeps the derivative finite for a candidate without any update.
    return (torch.stack(squares).sum() + 1e-30).sqrt()


def _dot(a: Tensor | OuterSum, b: Tensor) -> Tensor:
    """Return ``<a, b>``, shape ()."""
    return a.dot(b).to(b) if isinstance(a, OuterSum) else (a * b).sum()


def _apart(a: Tensor | OuterSum, b: Tensor, square: Tensor) -> Tensor:
    """Return ``|a - b|^2``, shape (), with ``|b|^2`` as `square`."""
    if isinstance(a, OuterSum):
        return (a.square() - 2 * a.dot(b) + square).to(b)
    # Its derivative takes one pass over the piece, that of a sum of squares two.
    return torch.linalg.vector_norm(a - b).square()

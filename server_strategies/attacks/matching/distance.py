"""Distances of a simulated update from the observed one.

Every distance is relative to the observed vector. So the weight of a prior means the
same for every learning rate of the client, and a candidate of zero is at distance 1.
The published distances that are not relative differ by a constant factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from server_strategies.attacks.matching.defended import Consistent, noise_part


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

    def __call__(self, candidate: Sequence[Tensor]) -> Tensor:
        """Return the distance, shape (), of a candidate vector a, in the same pieces."""
        if self._known:
            candidate = self._known.as_observed(candidate)
        return self._from(self._masked(candidate))

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
    def _from(self, candidate: Sequence[Tensor]) -> Tensor:
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

    def _from(self, candidate: Sequence[Tensor]) -> Tensor:
        dots = [(a * b).sum() for a, b in zip(candidate, self._seen, strict=True)]
        return self._best - torch.stack(dots).sum() / (norm(candidate) * self._norm)


class SquaredDistance(Distance):
    """``sum_l |a_l - b_l|^2 / sum_l |b_l|^2`` over parameters l (Zhu et al., 2019).

    Parameters are `Distance`'s.
    """

    name = "squared"

    def _from(self, candidate: Sequence[Tensor]) -> Tensor:
        apart = [a - b for a, b in zip(candidate, self._seen, strict=True)]
        return self._size(apart) / self._seen_size

    @cached_property
    def _seen_size(self) -> Tensor:
        return self._size(self._seen)

    def _size(self, vector: Sequence[Tensor]) -> Tensor:
        """Return the size, shape (), that the distance is a ratio of."""
        return _squares(vector).sum()


class LayeredDistance(SquaredDistance):
    """``sum_l |a_l - b_l| / sum_l |b_l|``, the norms not squared (Yin et al., 2021).

    Parameters are `Distance`'s.
    """

    name = "layered"

    def _size(self, vector: Sequence[Tensor]) -> Tensor:
        return torch.stack([norm([part]) for part in vector]).sum()


class DecayingDistance(SquaredDistance):
    """``sum_l e^-l |a_l - b_l|^2 / sum_l e^-l |b_l|^2``, l from 0 (Dimitrov et al., 2022).

    Parameters are `Distance`'s.
    """

    name = "decaying"

    def _size(self, vector: Sequence[Tensor]) -> Tensor:
        parts = [math.exp(-place) * part.square().sum() for place, part in enumerate(vector)]
        return torch.stack(parts).sum()


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
        squares = _squares(self._seen).detach()
        return 1 / (squares + 1e-6 * squares.sum())

    def _size(self, vector: Sequence[Tensor]) -> Tensor:
        return (self._weights * _squares(vector)).sum()


DISTANCES: dict[str, type[Distance]] = {
    kind.name: kind
    for kind in (CosineDistance, SquaredDistance, LayeredDistance, DecayingDistance, EvenDistance)
}


def norm(vector: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm, shape (), of a vector in pieces; differentiable at zero too."""
    # The constant keeps the derivative finite for a candidate without any update.
    return (_squares(vector).sum() + 1e-30).sqrt()


def _squares(vector: Sequence[Tensor]) -> Tensor:
    """Return the squared L2 norm of each piece, shape (pieces,)."""
    return torch.stack([part.square().sum() for part in vector])

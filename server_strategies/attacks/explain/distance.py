"""How far a candidate's account of an update is from the update that was seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CosineDistance:
    """``1 - <a, b> / (|a| |b|)`` over all parameters as one vector, in [0, 2].

    Parameters
    ----------
    seen : sequence of Tensor
        The observed vector b, one tensor a parameter.
    masks : sequence of Tensor of bool, optional
        Which coordinates count, in both vectors; in the same pieces as `seen`.

    Raises
    ------
    ValueError
        If b is zero wherever it counts.
    """

    def __init__(self, seen: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> None:
        self._masks = masks
        self._seen = self._masked(seen)
        self._norm = norm(self._seen)
        if not any(part.any() for part in self._seen):
            raise ValueError("the update is zero: the client returned what it was sent")

    def __call__(self, candidate: Sequence[Tensor]) -> Tensor:
        """Return the distance, shape (), of a candidate vector a, in the same pieces."""
        candidate = self._masked(candidate)
        dots = [(a * b).sum() for a, b in zip(candidate, self._seen, strict=True)]
        return 1 - torch.stack(dots).sum() / (norm(candidate) * self._norm)

    def _masked(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._masks is None:
            return vector
        return [part * mask for part, mask in zip(vector, self._masks, strict=True)]


def norm(vector: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm, shape (), of a vector in pieces; its slope is finite at zero too."""
    # The floor keeps the slope finite for a candidate that explains nothing.
    return (torch.stack([part.square().sum() for part in vector]).sum() + 1e-30).sqrt()

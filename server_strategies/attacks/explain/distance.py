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

    Raises
    ------
    ValueError
        If it is zero everywhere.
    """

    def __init__(self, seen: Sequence[Tensor]) -> None:
        self._seen = seen
        self._norm = _norm(seen)
        if not any(part.any() for part in seen):
            raise ValueError("the update is zero: the client returned what it was sent")

    def __call__(self, candidate: Sequence[Tensor]) -> Tensor:
        """Return the distance, shape (), of a candidate vector a, in the same pieces."""
        dots = [(a * b).sum() for a, b in zip(candidate, self._seen, strict=True)]
        return 1 - torch.stack(dots).sum() / (_norm(candidate) * self._norm)


def _norm(vector: Sequence[Tensor]) -> Tensor:
    # The floor keeps the slope finite for a candidate that explains nothing.
    return (torch.stack([part.square().sum() for part in vector]).sum() + 1e-30).sqrt()

"""The squared norm: an image prior that pixels are near the data set's mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SquaredNorm:
    """``weight mean(x^2)`` on normalised pixels.

    Attributes
    ----------
    weight : float
    mean, std : tuple of float
        The client's normalisation by channel.
    """

    weight: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the penalty of images in [0, 1], shape (N, C, H, W); `progress` is not used."""
        mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return self.weight * ((images - mean) / std).square().mean()

"""Total variation: an image prior that neighbouring pixels are alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TotalVariation:
    """``weight (mean|dx|^p + mean|dy|^p) / 2`` on normalised pixels; p = 1 as in SME.

    Attributes
    ----------
    weight : float
        Of the mean over pixels.
    std : tuple of float
        The client's normalisation by channel, which scales differences of
        [0, 1] pixels.
    power : int
        p.
    """

    weight: float
    std: tuple[float, ...]
    power: int = 1

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the penalty of images in [0, 1], shape (N, C, H, W); `progress` is not used."""
        pixels = images / images.new_tensor(self.std).view(-1, 1, 1)
        across = (pixels[..., :, 1:] - pixels[..., :, :-1]).abs().pow(self.power).mean()
        down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().pow(self.power).mean()
        return self.weight * (across + down) / 2

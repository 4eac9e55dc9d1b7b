"""Group consistency: an image prior that reconstructions of all restarts are of one image."""

from __future__ import annotations

import torch
from skimage.registration import phase_cross_correlation
from torch import Tensor


class GroupConsistency:
    """``weight mean|x_s - c|^2`` over the restarts s, c their consensus (Yin et al., 2021).

    The consensus is held constant. It is the mean over the restarts. In the second half
    of an attack the images are first registered to that mean, by shifts of whole pixels
    (phase cross-correlation, on the host), and then averaged again. The authors register
    by optical flow.

    Parameters
    ----------
    weight : float
    restarts : int
        S.
    every : int
        Iterations after which the registered consensus is renewed.
    """

    def __init__(self, weight: float, restarts: int, every: int = 20) -> None:
        self.weight, self.restarts, self.every = weight, restarts, every
        self._calls = 0
        self._registered: Tensor

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the penalty, shape (), of images in [0, 1], (S * N, C, H, W)."""
        group = images.unflatten(0, (self.restarts, -1))
        consensus = group.detach().mean(0)
        if progress >= 0.5:
            if self._calls % self.every == 0:
                self._registered = register(group.detach(), consensus).mean(0)
            self._calls += 1
            consensus = self._registered
        return self.weight * (group - consensus).square().mean()


def register(group: Tensor, reference: Tensor) -> Tensor:
    """Return images registered to a reference, by cyclic shifts of whole pixels.

    Parameters
    ----------
    group : Tensor, shape (S, N, C, H, W)
    reference : Tensor, shape (N, C, H, W)

    Returns
    -------
    Tensor, shape (S, N, C, H, W)
    """
    fixed, moving = reference.mean(1).cpu().numpy(), group.mean(2).cpu().numpy()
    shifted = group.clone()
    for start, candidates in enumerate(moving):
        for place, (image, target) in enumerate(zip(candidates, fixed, strict=True)):
            shift = phase_cross_correlation(target, image, normalization=None)[0]
            down, across = (int(pixels) for pixels in shift)
            shifted[start, place] = torch.roll(group[start, place], (down, across), (1, 2))
    return shifted

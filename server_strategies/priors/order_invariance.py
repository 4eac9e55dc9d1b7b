"""Invariance to the order of images: a prior that every pass takes the same ones."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F


class OrderInvariance:
    """``weight mean over pairs of passes of mean|s(x_a) - s(x_b)|^2`` (Dimitrov et al., 2022).

    s is the mean over a pass's images, in whatever order, of the outputs of one random
    3x3 convolution to 96 channels.

    Parameters
    ----------
    weight : float
    passes : int
        Passes compared; with fewer than 2 the penalty is 0.
    count : int
        Images of a pass, N.
    generator : torch.Generator
        Draws the convolution, on the images' device.
    """

    def __init__(self, weight: float, passes: int, count: int, generator: torch.Generator) -> None:
        self.weight, self.passes, self.count = weight, passes, count
        self.generator = generator
        self._kernel: Tensor | None = None

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the penalty of images in [0, 1], (at least passes * N, C, H, W), shape ().

        Those after the first `passes` are left out; `progress` is not used.
        """
        if self.passes < 2:
            return 0 * images.sum()
        if self._kernel is None:
            inputs = 9 * images.shape[1]
            shape = (96, images.shape[1], 3, 3)
            drawn = torch.randn(shape, generator=self.generator, device=images.device)
            self._kernel = drawn.to(images) / inputs**0.5
        seen = F.conv2d(images[: self.passes * self.count], self._kernel, padding=1)
        summaries = seen.unflatten(0, (self.passes, self.count)).mean(1)
        apart = [(a - b).square().mean() for a, b in combinations(summaries, 2)]
        return self.weight * torch.stack(apart).mean()

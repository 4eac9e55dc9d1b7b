"""A velocity network on images larger than those that it was trained on, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tile_starts(extent: int, size: int, shift: int) -> list[int]:
    """Return where tiles start along one side of an image.

    Every half tile, displaced by `shift`; the first and the last tile lie at the
    image's ends.

    Parameters
    ----------
    extent : int
        The side's length in pixels.
    size : int
        A tile's side, even, at most `extent`.
    shift : int
        In [0, size / 2).
    """
    half = size // 2
    return sorted({min(max(at, 0), extent - size) for at in range(shift - half, extent, half)})


class Tiled(nn.Module):
    """Average a network's velocity over tiles of the size that it was trained on.

    The tiles overlap by half and are displaced at random in every call, so that no seam
    stays at one place. The denoiser D is affine in v, so averaging v averages D.

    Parameters
    ----------
    network : nn.Module
        The velocity v(x_t, t), from `load_flow`; its attribute ``size`` is the tile's side.
    generator : torch.Generator
        Draws the displacements, on the CPU.
    """

    def __init__(self, network: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.network, self.generator = network, generator
        self.size = int(network.size)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at `x`, shapes and ranges as the network's."""
        starts = []
        for extent in x.shape[-2:]:
            size = min(self.size, extent)
            shift = int(torch.randint(size // 2, (), generator=self.generator))
            starts.append([slice(at, at + size) for at in tile_starts(extent, size, shift)])
        total, count = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
        for rows in starts[0]:
            for columns in starts[1]:
                total[..., rows, columns] += self.network(x[..., rows, columns], t)
                count[rows, columns] += 1
        return total / count

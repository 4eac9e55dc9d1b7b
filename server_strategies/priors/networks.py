"""Velocity networks v(x_t, t) of the flow prior.

One registry; `flow.py` uses a network, `training.py` trains it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_features(t: Tensor, width: int) -> Tensor:
    """Return sinusoidal features of the flow time.

    Parameters
    ----------
    t : Tensor, shape (batch,)
        Flow time in [0, 1].
    width : int
        Number of features, even.

    Returns
    -------
    Tensor, shape (batch, width)
        cos and sin of 1000 t at geometric frequencies (Vaswani et al., 2017).
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = 1000 * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the flow time scales and shifts between them.

    Shape (batch, inputs, H, W) -> (batch, outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        # A block starts as the identity: deep stacks train from the first step.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the block's output; `time` has shape (batch, time_width)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm2(hidden), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(hidden))


class CompactUNet(nn.Module):
    """A two-stage UNet on pixel-unshuffled images, the default on a CPU.

    `PixelUnshuffle(2)` turns (3, 32, 32) into (12, 16, 16), so that no
    convolution runs at full resolution. Fully convolutional: any height and
    width divisible by four.

    Parameters
    ----------
    width : int
        Channels of the first stage; the second has twice as many.
    channels : int
        Image channels.
    """

    def __init__(self, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.width = width
        time_width = 2 * width
        wide = 2 * width
        self.time = nn.Sequential(
            nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width), nn.SiLU()
        )
        self.unshuffle = nn.PixelUnshuffle(2)
        self.head = nn.Conv2d(4 * channels, width, 3, padding=1)
        self.down = nn.ModuleList([ResidualBlock(width, width, time_width) for _ in range(2)])
        self.shrink = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([ResidualBlock(wide, wide, time_width) for _ in range(3)])
        self.grow = nn.Conv2d(wide, width, 3, padding=1)
        self.up = nn.ModuleList(
            [ResidualBlock(2 * width, width, time_width), ResidualBlock(width, width, time_width)]
        )
        self.norm = nn.GroupNorm(8, width)
        self.tail = nn.Conv2d(width, 4 * channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        nn.init.zeros_(self.tail.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at `x`.

        Parameters
        ----------
        x : Tensor, shape (batch, C, H, W)
            Noisy images x_t; clean pixels are in [-1, 1].
        t : Tensor, shape (batch,)
            Flow time in [0, 1]; 1 is clean.

        Returns
        -------
        Tensor, shape (batch, C, H, W)
        """
        time = self.time(time_features(t, self.width).to(x.dtype))
        hidden = self.head(self.unshuffle(x))
        for block in self.down:
            hidden = block(hidden, time)
        skip = hidden
        hidden = self.shrink(hidden)
        for block in self.middle:
            hidden = block(hidden, time)
        hidden = self.grow(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        hidden = torch.cat([hidden, skip], dim=1)
        for block in self.up:
            hidden = block(hidden, time)
        return self.shuffle(self.tail(F.silu(self.norm(hidden))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"compact": CompactUNet}
"""Velocity networks by name, each built with its published settings."""


def create_network(name: str) -> nn.Module:
    """Return a freshly initialised velocity network.

    Raises
    ------
    ValueError
        If no network has this name.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown flow network {name!r}; known: {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name]()

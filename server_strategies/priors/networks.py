"""Velocity networks v(x_t, t) of the flow prior.

One registry; `flow.py` uses a network, `training.py` trains it. Each has an
attribute ``multiple``: it takes images whose height and width are multiples of
that many pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    convolution runs at full resolution.

    Parameters
    ----------
    width : int
        Channels of the first stage; the second has twice as many.
    channels : int
        Image channels.
    """

    multiple = 4  # one unshuffle and one stage down, each by two

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


class SelfAttention(nn.Module):
    """Self-attention among all positions of an image, added to its input.

    Shape (batch, channels, H, W) -> the same.

    Parameters
    ----------
    channels : int
        Divisible by `head_channels`.
    head_channels : int
        Channels of one head.
    """

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)  # starts as the identity, like a ResidualBlock

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        positions = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        # Each (batch, heads, positions, channels of a head); views where x is channels-last.
        query, key, value = positions.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value)
        found = found.transpose(1, 2).flatten(2).transpose(1, 2)
        return x + self.out(found.unflatten(2, x.shape[2:]))


class UNetBlock(nn.Module):
    """A `ResidualBlock`, followed by `SelfAttention` where `attends`; shapes as the former."""

    def __init__(self, inputs: int, outputs: int, time_width: int, attends: bool) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, time_width)
        self.attention = SelfAttention(outputs) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the block's output; `time` has shape (batch, time_width)."""
        return self.attention(self.residual(x, time))


class UNet64(nn.Module):
    """The paper's network: a UNet of base width 64, unconditional; best on a GPU.

    Two residual blocks a stage (the paper, section 4). What the paper leaves
    open is as in the network that it cites (Lipman et al., 2023, after Dhariwal
    and Nichol, 2021): widths of 1, 2 and 2 times the base, a skip connection
    from every layer on the way down, three blocks a stage on the way up, and
    self-attention in the second stage (16x16 for images of 32x32) and at the
    bottom. Theirs has a fourth stage and a wider time embedding; without them
    it fits into 13 MB.

    Parameters
    ----------
    width : int
        Channels of the first stage; a multiple of 32.
    channels : int
        Image channels.
    """

    multiple = 4  # two steps down, each by two

    def __init__(self, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.width = width
        widths = (width, 2 * width, 2 * width)
        attends = (False, True, False)
        self.stages = len(widths)
        self.time = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.head = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()

        now, skips = width, [width]  # channels
        for stage, wide in enumerate(widths):
            if stage > 0:
                self.shrink.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
            for _ in range(2):
                self.down.append(UNetBlock(now, wide, width, attends[stage]))
                now = wide
                skips.append(now)
        self.middle = nn.ModuleList(
            [UNetBlock(now, now, width, attends=choice) for choice in (True, False)]
        )
        for stage in reversed(range(self.stages)):
            for _ in range(3):
                inputs, now = now + skips.pop(), widths[stage]
                self.up.append(UNetBlock(inputs, now, width, attends[stage]))
            if stage > 0:
                self.grow.append(nn.Conv2d(now, now, 3, padding=1))
        self.norm = nn.GroupNorm(8, now)
        self.tail = nn.Conv2d(now, channels, 3, padding=1)
        nn.init.zeros_(self.tail.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at `x`; shapes and ranges as `CompactUNet.forward`."""
        time = self.time(time_features(t, self.width).to(x.dtype))
        hidden = self.head(x)
        skips = [hidden]
        for stage in range(self.stages):
            if stage > 0:
                hidden = self.shrink[stage - 1](hidden)
                skips.append(hidden)
            for block in self.down[2 * stage : 2 * stage + 2]:
                hidden = block(hidden, time)
                skips.append(hidden)
        for block in self.middle:
            hidden = block(hidden, time)
        for stage in range(self.stages):
            if stage > 0:
                hidden = F.interpolate(hidden, scale_factor=2, mode="nearest")
                hidden = self.grow[stage - 1](hidden)
            for block in self.up[3 * stage : 3 * stage + 3]:
                hidden = block(torch.cat([hidden, skips.pop()], dim=1), time)
        return self.tail(F.silu(self.norm(hidden)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"compact": CompactUNet, "unet64": UNet64}
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


def check_shape(network: nn.Module, shape: Sequence[int]) -> None:
    """Refuse images that a velocity network can't take.

    Parameters
    ----------
    network : nn.Module
        From `create_network`.
    shape : sequence of int
        Of the images; (N, 3, H, W) is wanted.

    Raises
    ------
    ValueError
        If there are not three channels, or H or W is no multiple of the
        network's `multiple`.
    """
    multiple = int(network.multiple)  # type: ignore[arg-type]
    if len(shape) != 4 or shape[1] != 3 or shape[2] % multiple or shape[3] % multiple:
        raise ValueError(
            f"the flow prior takes images (N, 3, H, W) with H and W divisible by {multiple}, "
            f"got {tuple(shape)}"
        )

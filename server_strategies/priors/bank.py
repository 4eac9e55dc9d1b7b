"""The image bank: images that a regression learns on, drawn from a flow prior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.util.files import project_file, whole_file
from server_strategies.priors.flow import generate

SIZE = 32  # height and width of a bank's images
_AT_ONCE = 50  # images that are drawn in one go; a part of what the seed decides
_COLUMNS = 50  # of the mosaic
_QUALITY = 92  # of JPEG, without chroma subsampling: 1.2 kB an image


def draw_bank(
    network: nn.Module,
    count: int,
    steps: int = 20,
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Draw images from a flow prior, see `generate`.

    Parameters
    ----------
    network : nn.Module
        The velocity network, from `load_flow`.
    count : int
        1 or more.
    steps : int
        Euler steps from noise to an image.
    seed : int
    tell : callable, optional
        Takes the number of images so far.

    Returns
    -------
    Tensor of uint8, shape (count, 3, 32, 32)
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []
    for first in range(0, count, _AT_ONCE):
        noise = torch.randn((_AT_ONCE, 3, SIZE, SIZE), generator=generator)
        with torch.no_grad():
            images = generate(network, noise[: count - first], steps)
        drawn.append((255 * (images.clamp(-1, 1) + 1) / 2).round().byte())
        tell(first + len(images))
    return torch.cat(drawn)


def write_bank(images: Tensor, path: Path) -> None:
    """Write images as one mosaic, which `load_bank` reads.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, 3, 32, 32)
        Whole rows of 50, or fewer than 50.
    path : Path
        Of a file that Pillow can write: ``.jpg`` or ``.png``.

    Raises
    ------
    ValueError
        If the images do not fill the mosaic's rows.
    """
    columns = min(_COLUMNS, len(images))
    if len(images) % columns:
        raise ValueError(f"{len(images)} images do not fill rows of {columns}; allowed: multiples")
    grid = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    mosaic = Image.fromarray(grid.reshape(-1, columns * SIZE, 3).numpy())
    options = {"quality": _QUALITY, "subsampling": 0} if path.suffix != ".png" else {}
    with whole_file(path) as temporary:
        mosaic.save(temporary, format="PNG" if path.suffix == ".png" else "JPEG", **options)


def load_bank(image_shape: tuple[int, int, int]) -> Tensor:
    """Load the shipped bank in the shape of a client's images.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W). Images of another size are resized; grey ones are the luma of coloured
        ones (ITU-R BT.601).

    Returns
    -------
    Tensor, shape (N, C, H, W)
        In [0, 1].

    Raises
    ------
    ValueError
        If C is neither 1 nor 3.
    """
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise ValueError(f"the image bank has images of 1 or 3 channels, not of {channels}")
    found = _resized(_shipped(), height, width)
    if channels == 3:
        return found
    luma = found.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (found * luma).sum(1, keepdim=True)


def _shipped() -> Tensor:
    path = project_file("server_strategies/priors/weights/bank.jpg")
    with path.open("rb") as file, Image.open(file) as mosaic:
        grid = torch.from_numpy(np.array(mosaic.convert("RGB")))
    cut = grid.unflatten(0, (-1, SIZE)).unflatten(2, (-1, SIZE))
    return cut.permute(0, 2, 4, 1, 3).flatten(0, 1)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    """Return images of uint8 (N, 3, h, w) as floats in [0, 1], of the height and width wanted."""
    floats = images.float() / 255
    if floats.shape[2:] == (height, width):
        return floats
    sized = F.interpolate(floats, (height, width), mode="bilinear", antialias=True)
    return sized.clamp(0, 1)

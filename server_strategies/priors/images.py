"""The images that a flow prior is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fl_app.data.base import DataError, read_image
from fl_app.data.imagefolder import SUFFIXES

LAYOUTS = ("images", "mosaic")


def load_images(source: str, layout: str = "images", size: int = 32) -> tuple[Tensor, int]:
    """Load training images into memory.

    Parameters
    ----------
    source : str
        A folder of images, with any folders in it; a folder of parquet files,
        or the name ``ORG/NAME`` of a data set on the Hugging Face hub, of which
        the train split is taken; or an ``.npy`` file of uint8 (N, size, size, 3).
    layout : {"images", "mosaic"}
        Whether an image of the source is one training image (its centre square,
        resized to `size` by Lanczos' filter, up or down) or a grid of
        `size` x `size` tiles, row by row.
    size : int
        Height and width in pixels.

    Returns
    -------
    images : Tensor of uint8, shape (N, 3, size, size)
    broken : int
        Images that could not be read, which were skipped.

    Raises
    ------
    ValueError
        If the source does not exist, holds no usable image or arrays of another
        shape, or an image of it is no mosaic.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    path = Path(source).expanduser()
    if path.suffix == ".npy" and path.is_file():
        return _read_array(path, size), 0
    files: Iterator[tuple[BytesIO | str, str]]
    if path.is_dir():
        files = _dataset(str(path)) if any(path.rglob("*.parquet")) else _folder(path)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not path.exists():
        files = _dataset(source)
    else:
        raise ValueError(
            f"no training images: {source!r} is no folder, no .npy file "
            "and no name ORG/NAME of a data set on the hub"
        )
    parts, broken = [], 0
    for file, where in files:
        try:
            pixels = read_image(file, where)
        except DataError:
            broken += 1
            continue
        parts.append(_tiles(pixels, size, where) if layout == "mosaic" else _square(pixels, size))
    if not parts:
        raise ValueError(f"no readable image in {source} ({broken} broken)")
    return torch.from_numpy(np.concatenate(parts)), broken


def _read_array(path: Path, size: int) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers in NumPy's format: {error}") from error
    if array.dtype != np.uint8 or array.shape[1:] != (size, size, 3):
        raise ValueError(
            f"{path} holds {array.dtype} {array.shape}; needed: uint8 (N, {size}, {size}, 3)"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _folder(path: Path) -> Iterator[tuple[BytesIO | str, str]]:
    """Yield the image files of a folder and of those in it, each with its name."""
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            yield str(file), str(file)


def _dataset(location: str) -> Iterator[tuple[BytesIO | str, str]]:
    """Yield the images of a data set's train split, still encoded, each with its name.

    `location` is a folder or a name on the hub.
    """
    import datasets  # slow to import, and no other user of priors needs it

    try:
        loaded = datasets.load_dataset(location, split="train")
    except Exception as error:  # from the network, the hub, pyarrow or the disk
        where = "the folder" if Path(location).is_dir() else "the hub (no folder has that name)"
        raise ValueError(f"{location}: no train split from {where}. Cause: {error}") from error
    columns = [k for k, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(
            f"{location} has no column of images; its columns: {', '.join(loaded.column_names)}"
        )
    encoded = loaded.cast_column(columns[0], datasets.Image(decode=False))
    for row, image in enumerate(encoded.select_columns(columns[:1])):
        cell = image[columns[0]] or {"bytes": b""}  # an empty cell is a broken image
        data = cell["bytes"]
        yield BytesIO(data) if data is not None else cell["path"], f"{location}: image {row}"


def _square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return the centre square of (3, H, W), resized, shape (1, 3, size, size)."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted).transpose(2, 0, 1)[None]


def _tiles(pixels: np.ndarray, size: int, where: str) -> np.ndarray:
    """Cut a grid (3, rows size, columns size) into its tiles, shape (N, 3, size, size)."""
    rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
    if not rows * columns or pixels.shape[1:] != (rows * size, columns * size):
        raise ValueError(
            f"{where} has {pixels.shape[1]} x {pixels.shape[2]} pixels: "
            f"no mosaic of {size} x {size} tiles"
        )
    tiles = pixels.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
    return tiles.reshape(-1, 3, size, size)

"""What every data set is made of: its facts, its images, and how they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fl_app.config import DatasetConfig
from fl_app.protocol import DatasetInfo
from fl_app.util.extras import extras
from fl_app.util.files import user_path

if TYPE_CHECKING:
    import datasets
    from PIL import Image

# `datasets` and flwr-datasets take three seconds to import, plotting libraries and all, and
# commands and attack workers seldom need them: in this package functions import them. Client
# processes share one console with Flower's own log, so they are to be quiet.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("DATASETS_VERBOSITY", "error")


class DataError(ValueError):
    """Data that is not there or can't be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels, in memory. Shared between callers: don't write into them.

    Attributes
    ----------
    images : Tensor, shape (N, C, H, W), uint8
        In [0, 255].
    labels : Tensor, shape (N,), int64
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_class(self, label: int, count: int, seed: int) -> Tensor:
        """Return images of a class, drawn without replacement: `count`, or all if fewer."""
        own = (self.labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        return self.images[own[torch.randperm(len(own), generator=generator)[:count]]]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from; one for each name in `DatasetConfig`.

    Attributes
    ----------
    info : callable
        ``info(config) -> DatasetInfo``.
    split : callable
        ``split(config, "train" | "test") -> datasets.Dataset`` with the columns
        ``image`` (`datasets.Image`, still encoded) and ``label`` (int).
    """

    info: Callable[[DatasetConfig], DatasetInfo]
    split: Callable[[DatasetConfig, str], datasets.Dataset]


def find_folder(source: str) -> Path:
    """Return the folder that a configuration names, see `user_path`.

    Raises
    ------
    DataError
        If there is no such folder.
    """
    if not source:
        raise DataError("dataset.source is empty; set it to a folder's path")
    path = user_path(source)
    if not path.is_dir():
        raise DataError(
            f"dataset.source is {source!r}, but {path} is not a folder; "
            "set dataset.source to the absolute path of a folder that this machine can read"
        )
    return path.resolve()


def encoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return a `datasets.Dataset` whose column ``image`` is left encoded when it is read."""
    with extras():
        import datasets

    return dataset.cast_column("image", datasets.Image(decode=False))


def read_image(file: BytesIO | str, where: str, channels: int = 3) -> np.ndarray:
    """Return an image file's pixels, shape (channels, H, W), uint8: as `datasets.Image` has them.

    That is the first frame, turned as its EXIF orientation says.

    Parameters
    ----------
    file : BytesIO or str
    where : str
        Names it, for errors.
    channels : int
        3: grey images get three equal channels. 1: of colours the luma is taken.

    Raises
    ------
    DataError
        If the file is broken, or holds what these pixels can't: more than 8 bits a
        channel, transparency, or colours that are not RGB; it names `where`.
    """
    with extras():  # here, so that a client with data of its own needs no Pillow
        from PIL import Image, ImageOps
    try:
        with Image.open(file) as image:
            why = _unfit(image)
            turned = ImageOps.exif_transpose(image)
            if not why and _transparent(turned):
                why = "has transparent pixels; allowed: opaque ones"
            pixels = np.asarray(turned.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
        raise DataError(f"{where} can't be read as an image: {error}") from error
    if why:
        raise DataError(f"{where} {why}. Convert it first")
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _unfit(image: Image.Image) -> str:
    """Return why an opened image, still undecoded, can't be 8 bits of grey or RGB; "": it can."""
    if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA"):
        return f"has mode {image.mode}; allowed: 8 bits a channel, grey or RGB"
    # Pillow would keep the upper 8 of 16 bits without a word.
    raw = repr([tile[3] for tile in getattr(image, "tile", [])])
    wide = re.search(r";(16|32)[A-Z]", raw)
    if wide or (image.format == "PPM" and _largest_ppm(image) > 255):
        return "has 16 bits a channel; allowed: 8 bits a channel"
    return ""


def _largest_ppm(image: Image.Image) -> int:
    """Return the largest value of a PPM or PGM image, which its decoder scales to 8 bits."""
    arguments = getattr(image, "tile", [(0, 0, 0, ())])[0][3]
    return next((each for each in reversed(arguments) if isinstance(each, int)), 255)


def _transparent(image: Image.Image) -> bool:
    if not ({"A", "a"} & {*image.getbands()} or "transparency" in image.info):
        return False
    alpha = image.convert("RGBA").getchannel("A")
    return bool(np.asarray(alpha).min() < 255)


def read_images(dataset: datasets.Dataset, info: DatasetInfo, name: str) -> ImageSet:
    """Decode every row of an `encoded` data set.

    Raises
    ------
    DataError
        If an image is missing, broken or not of ``info.image_shape``, or a label is
        missing or not a class.
    """
    images = np.empty((len(dataset), *info.image_shape), dtype=np.uint8)
    given = dataset["label"][:]
    if None in given:
        raise DataError(f"{name}: image {given.index(None)} has no label")
    labels = torch.tensor(given, dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < info.num_classes:
        raise DataError(
            f"{name} has labels from {labels.min()} to {labels.max()}; "
            f"allowed: 0 to {info.num_classes - 1}"
        )
    for row, image in enumerate(dataset["image"][:]):
        if image is None:
            raise DataError(f"{name}: image {row} is missing")
        where = f"{name}: {image['path'] or f'image {row}'}"
        file = BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
        pixels = read_image(file, where, info.image_shape[0])
        if pixels.shape != info.image_shape:
            raise DataError(
                f"{where} has shape {pixels.shape} (C, H, W); all images must have "
                f"{info.image_shape}. Resize or remove it"
            )
        images[row] = pixels
    return ImageSet(torch.from_numpy(images), labels)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel.

    Parameters
    ----------
    images : Tensor, shape (N, C, H, W), uint8

    Returns
    -------
    mean, std : tuple of float
        Of the pixels in [0, 1].
    """
    pixels = images.double() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())

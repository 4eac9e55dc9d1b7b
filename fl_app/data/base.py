"""What every data set is made of: its facts, its images, and how they are read."""

from __future__ import annotations

import os
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
    """Return an image file's pixels, shape (channels, H, W), uint8.

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
        If the file is broken or has more than 8 bits a channel; it names `where`.
    """
    with extras():  # here, so that a client with data of its own needs no Pillow
        from PIL import Image
    try:
        with Image.open(file) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
        raise DataError(f"{where} can't be read as an image: {error}") from error
    if mode.startswith(("I", "F")):
        # Pillow would clip these to white without a word.
        raise DataError(f"{where} has mode {mode}; allowed: 8 bits a channel. Convert it first")
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


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

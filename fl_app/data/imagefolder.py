"""Your own images: SOURCE/train/CLASS/*.png and SOURCE/test/CLASS/*.png.

Whatever else is in train and test is refused, but for names that start with a dot.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fl_app.config import DatasetConfig
from fl_app.data.base import (
    DataError,
    Source,
    channel_statistics,
    encoded,
    find_folder,
    read_image,
    read_images,
)
from fl_app.protocol import DatasetInfo
from fl_app.util.extras import extras

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Images that the mean and standard deviation are taken from, evenly spaced.
STATISTICS_IMAGES = 1000


def _classes(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; the place in the list is the label."""
    if not folder.is_dir():
        raise DataError(
            f"imagefolder: {folder} is not a folder; needed: {folder}/CLASS/ with images"
        )
    entries = _entries(folder)
    for entry in entries:
        if not entry.is_dir():
            raise DataError(f"imagefolder: {entry} is in no class folder; move or remove it")
    return [entry.name for entry in entries]


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted; without what is hidden, as `datasets` does."""
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")


def _images(folder: Path) -> list[str]:
    """Return the image files of a class folder, sorted.

    Raises
    ------
    DataError
        If it holds none, or anything else.
    """
    files = _entries(folder)
    for file in files:
        if file.is_dir():
            raise DataError(
                f"imagefolder: {file} is a folder in a class folder; move its images to {folder}"
            )
        if not file.is_file() or file.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"imagefolder: {file} is no image file; allowed: {', '.join(SUFFIXES)}. "
                "Convert or remove it"
            )
    if not files:
        raise DataError(f"imagefolder: {folder} holds no image ({', '.join(SUFFIXES)})")
    return [str(file) for file in files]


def _split(config: DatasetConfig, split: str) -> datasets.Dataset:
    with extras():
        import datasets

    root = find_folder(config.source)
    known = _classes(root / "train")
    paths: list[str] = []
    labels: list[int] = []
    for name in _classes(root / split):
        folder = root / split / name
        if name not in known:
            raise DataError(
                f"imagefolder: {folder} has no folder in train; allowed: {', '.join(known)}"
            )
        files = _images(folder)
        paths += files
        labels += [known.index(name)] * len(files)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return encoded(datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features))


def _info(config: DatasetConfig) -> DatasetInfo:
    """Return the facts: the first image gives the shape, a sample of train the statistics."""
    train = _split(config, "train")
    classes = _classes(find_folder(config.source) / "train")
    if len(classes) < 2:
        there = f"one class folder, {classes[0]}" if classes else "no class folder"
        raise DataError(f"imagefolder: {config.source}/train holds {there}; needed: two or more")
    first = train[0]["image"]["path"]
    _, height, width = read_image(first, f"imagefolder: {first}").shape
    info = DatasetInfo(
        num_classes=len(classes),
        image_shape=(3, height, width),
        mean=(),
        std=(),
    )
    rows = np.unique(np.linspace(0, len(train) - 1, STATISTICS_IMAGES).astype(int))
    sample = read_images(train.select(rows), info, "imagefolder")
    mean, std = channel_statistics(sample.images)
    if min(std) == 0:
        raise DataError(f"imagefolder: a channel of {config.source}/train has one value throughout")
    return replace(info, mean=mean, std=std)


SOURCE = Source(info=_info, split=_split)

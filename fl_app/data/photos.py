"""The embedded data set: crops of the photographs inside scikit-image's wheel.

Nothing is downloaded, and nothing is private. The label is the photograph.
The left quarter of each photograph is for the test split, the rest for the
train split, so no pixel is in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fl_app.config import DatasetConfig
from fl_app.data.base import DataError, Source, encoded
from fl_app.protocol import DatasetInfo
from fl_app.util.extras import extras

if TYPE_CHECKING:
    import datasets

# The label is the place in this list. All are in the wheel itself; scikit-image
# fetches most of its other pictures from the network.
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "ihc.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
SIZE = 32
# Sides of the crops by a photograph's shorter side: from whole objects to details.
FRACTIONS = (3 / 4, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
# A crop whose channels vary less than this (standard deviation, pixels in [0, 1])
# is all but one colour, and a flat guess would count as a good reconstruction.
MIN_STD = 0.1

INFO = DatasetInfo(
    num_classes=len(PHOTOS),
    image_shape=(3, SIZE, SIZE),
    mean=(0.5633, 0.4240, 0.3554),
    std=(0.2484, 0.2488, 0.2585),
)


@dataclass(frozen=True)
class Crop:
    """A square of a photograph.

    Attributes
    ----------
    label : int
        The place in `PHOTOS`.
    box : tuple of int
        (left, upper, right, lower) in the photograph's pixels, right and lower excluded.
    image : PIL.Image.Image
        The square at 32x32, RGB.
    """

    label: int
    box: tuple[int, int, int, int]
    image: Image.Image


def open_photo(name: str) -> Image.Image:
    """Return a photograph of `PHOTOS` as RGB.

    Raises
    ------
    DataError
        If the installed scikit-image does not hold it.
    """
    path = files("skimage") / "data" / name
    if not path.is_file():
        raise DataError(f"photos needs {path}, which this scikit-image lacks; reinstall it")
    with path.open("rb") as file, Image.open(file) as photo:
        return photo.convert("RGB")


@lru_cache(maxsize=2)
def crops(split: str) -> tuple[Crop, ...]:
    """Return the crops of a split, photograph by photograph, coarse to fine.

    Neighbours of one scale overlap by half.

    Parameters
    ----------
    split : {"train", "test"}
    """
    kept = []
    for label, name in enumerate(PHOTOS):
        photo = open_photo(name)
        width, height = photo.size
        border = width // 4
        left, right = (border, width) if split == "train" else (0, border)
        for fraction in FRACTIONS:
            side = int(min(width, height) * fraction)
            for top in range(0, height - side + 1, side // 2):
                for start in range(left, right - side + 1, side // 2):
                    box = (start, top, start + side, top + side)
                    # Cut first: a filter must not look past the box.
                    small = photo.crop(box).resize((SIZE, SIZE), Image.Resampling.BOX)
                    if np.asarray(small).std(axis=(0, 1)).mean() >= MIN_STD * 255:
                        kept.append(Crop(label, box, small))
    return tuple(kept)


def _split(config: DatasetConfig, split: str) -> datasets.Dataset:
    with extras():
        import datasets

    chosen = crops(split)
    columns = {"image": [crop.image for crop in chosen], "label": [crop.label for crop in chosen]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return encoded(datasets.Dataset.from_dict(columns, features=features))


SOURCE = Source(info=lambda config: INFO, split=_split)

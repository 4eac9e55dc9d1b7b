"""Public data sets, from the Hugging Face hub or a local folder in its layout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.config import DatasetConfig
from fl_app.data.base import DataError, Source, encoded, find_folder
from fl_app.protocol import DatasetInfo
from fl_app.util.extras import extras

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class _Layout:
    """How a data set is laid out on the hub."""

    image: str = "image"  # column
    label: str = "label"  # column
    test: str = "test"  # split


LAYOUTS = {
    "cifar10": _Layout(image="img"),
    "cifar100": _Layout(image="img", label="fine_label"),
    "tiny_imagenet": _Layout(test="valid"),  # its test split has no labels
    "mnist": _Layout(),
    "fashion_mnist": _Layout(),
}
_INFOS = {
    "cifar10": DatasetInfo(
        num_classes=10,
        image_shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": DatasetInfo(
        num_classes=100,
        image_shape=(3, 32, 32),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "tiny_imagenet": DatasetInfo(
        num_classes=200,
        image_shape=(3, 64, 64),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    ),
    "mnist": DatasetInfo(num_classes=10, image_shape=(1, 28, 28), mean=(0.1307,), std=(0.3081,)),
    "fashion_mnist": DatasetInfo(
        num_classes=10, image_shape=(1, 28, 28), mean=(0.2860,), std=(0.3530,)
    ),
}


def _location(source: str) -> str:
    """Return what `datasets.load_dataset` should open: a folder that exists, or a hub name."""
    try:
        return str(find_folder(source))
    except DataError:
        # ORG/NAME; a path that starts with ., / or ~ is never tried on the hub.
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
            return source
        raise


def on_hub(config: DatasetConfig) -> bool:
    """Say whether a data set would be fetched from the hub, or from its cache."""
    if config.name not in LAYOUTS:
        return False
    try:
        return not Path(_location(config.source)).is_dir()
    except DataError:
        return False


def _split(config: DatasetConfig, split: str) -> datasets.Dataset:
    with extras():
        from flwr_datasets import FederatedDataset

    layout = LAYOUTS[config.name]
    location = _location(config.source)
    try:
        # Unshuffled: partitions are cut the same way for every source.
        federated = FederatedDataset(dataset=location, partitioners={}, shuffle=False)
        loaded = federated.load_split(layout.test if split == "test" else split)
    except Exception as error:  # from the network, the hub, pyarrow or the disk
        where, help_ = location, "the folder must have the layout of the hub's data set"
        if not Path(location).is_dir():
            where = f"the hub's {location} (no folder here has that name)"
            help_ = "to use a local copy, set dataset.source=/path/to/folder"
        raise DataError(
            f"{config.name}: the {split} split can't be loaded from {where}; {help_}. "
            f"Cause: {error}"
        ) from error
    names = {layout.image: "image", layout.label: "label"}
    if names.keys() - set(loaded.column_names):
        raise DataError(
            f"{config.name}: {location} has the columns {', '.join(loaded.column_names)}; "
            f"needed: {', '.join(names)}"
        )
    return encoded(loaded.select_columns(list(names)).rename_columns(names))


SOURCE = Source(info=lambda config: _INFOS[config.name], split=_split)

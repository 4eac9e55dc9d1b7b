"""The images that clients hold: a source each, one way to read and to partition them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fl_app.config import DatasetConfig
from fl_app.data.base import DataError, ImageSet, read_images
from fl_app.data.hub import on_hub
from fl_app.protocol import DatasetInfo
from fl_app.registry import DATASETS
from fl_app.util.extras import extras

if TYPE_CHECKING:
    import datasets
    from flwr_datasets.partitioner import Partitioner

__all__ = [
    "DataError",
    "ImageSet",
    "check_test",
    "dataset_info",
    "draw_class",
    "draw_images",
    "fingerprint",
    "halves",
    "load_evaluation",
    "load_partition",
    "load_split",
    "on_hub",
]

_FINGERPRINT_IMAGES = 16


@lru_cache(maxsize=4)
def dataset_info(config: DatasetConfig) -> DatasetInfo:
    """Return the facts of a data set.

    Only `imagefolder` has to look at the images for them.

    Raises
    ------
    DataError
        If an image folder is missing or can't be used.
    """
    return DATASETS[config.name].info(config)


@lru_cache(maxsize=4)
def _encoded_split(config: DatasetConfig, split: str) -> datasets.Dataset:
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}; allowed: train, test")
    encoded = DATASETS[config.name].split(config, split)
    if split == "train" and len(encoded.unique("label")) < 2:
        raise DataError(f"{config.name}: the train split has fewer than two classes")
    if not len(encoded):
        raise DataError(f"{config.name}: the {split} split holds no image")
    return encoded


def halves(labels: Iterable[int]) -> tuple[list[int], list[int]]:
    """Return the indices of images in two halves that hold every class alike.

    In each class the images take turns, whatever their order: every second image of a data set
    whose classes alternate would be of every second class.

    Parameters
    ----------
    labels : iterable of int

    Returns
    -------
    two lists of int, each ascending
        The first has the one image more of a class whose count is odd.
    """
    seen: Counter[int] = Counter()
    parts: tuple[list[int], list[int]] = ([], [])
    for index, label in enumerate(labels):
        parts[seen[label] % 2].append(index)
        seen[label] += 1
    return parts


def _clients_rows(config: DatasetConfig) -> datasets.Dataset:
    """Return what all clients hold together: the train split, or half of the test images."""
    rows = _encoded_split(config, config.split)
    # Of benchmarks, the half by which no constant is chosen.
    return rows if config.split == "train" else rows.select(halves(rows["label"][:])[1])


def _evaluation_rows(config: DatasetConfig) -> datasets.Dataset:
    """Return what evaluates the global model: the test images that no client holds."""
    rows = _encoded_split(config, "test")
    return rows if config.split == "train" else rows.select(halves(rows["label"][:])[0])


@lru_cache(maxsize=2)
def _partitioner(config: DatasetConfig, num_partitions: int, seed: int) -> Partitioner:
    """Return flwr-datasets' partitioner of what clients hold, shuffled as FederatedDataset does."""
    with extras():
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    train = _clients_rows(config)
    if not 1 <= num_partitions <= len(train):
        raise DataError(
            f"num_clients is {num_partitions}; allowed for {config.name}: "
            f"1 to {len(train)}, the images of dataset.split={config.split}"
        )
    if config.partitioner == "iid":
        partitioner: Partitioner = IidPartitioner(num_partitions)
    else:
        partitioner = DirichletPartitioner(
            num_partitions,
            partition_by="label",
            alpha=config.dirichlet_alpha,
            min_partition_size=1,  # skew is asked for; only an empty client is of no use
            seed=seed,
        )
    partitioner.dataset = train.shuffle(seed=seed, keep_in_memory=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each new draw
            partitioner.load_partition(0)
    except ValueError as error:
        raise DataError(
            f"dataset.dirichlet_alpha is {config.dirichlet_alpha}: some of {num_partitions} "
            "clients got no image in eleven draws; raise it, or lower num_clients"
        ) from error
    return partitioner


@lru_cache(maxsize=8)
def load_partition(
    config: DatasetConfig, partition: int, num_partitions: int, seed: int
) -> ImageSet:
    """Return a client's part of what all hold; only its own images are decoded.

    The parts of all clients are disjoint and cover it. They depend on
    the arguments alone, so every process cuts them alike.

    Parameters
    ----------
    config : DatasetConfig
        Names the data set and the partitioner: ``iid``, equal shares of a
        shuffle, or ``dirichlet``, per-class shares drawn from
        Dir(`dirichlet_alpha`) (Yurochkin et al., 2019, arXiv:1905.12022).
    partition : int
        In [0, num_partitions).
    num_partitions : int
    seed : int

    Raises
    ------
    DataError
        If the data is not there or is broken, or can't be cut in so many parts.
    """
    if not 0 <= partition < num_partitions:
        raise DataError(f"partition is {partition}; allowed: 0 to {num_partitions - 1}")
    part = _partitioner(config, num_partitions, seed).load_partition(partition)
    return read_images(part, dataset_info(config), config.name)


@lru_cache(maxsize=2)
def load_split(config: DatasetConfig, split: str) -> ImageSet:
    """Return a whole split.

    Parameters
    ----------
    config : DatasetConfig
    split : {"train", "test"}
        Tiny-ImageNet's labelled validation images are its test split.

    Raises
    ------
    DataError
        If the data is not there or is broken.
    """
    return read_images(_encoded_split(config, split), dataset_info(config), config.name)


@lru_cache(maxsize=2)
def load_evaluation(config: DatasetConfig) -> ImageSet:
    """Return the images that evaluate the global model: test images that no client holds.

    Raises
    ------
    DataError
        If the data is not there or is broken.
    """
    return read_images(_evaluation_rows(config), dataset_info(config), config.name)


@lru_cache(maxsize=4)
def fingerprint(config: DatasetConfig) -> str:
    """Return a digest of what all clients hold: of labels, and of the pixels of a few images.

    Raises
    ------
    DataError
        If the data is not there or is broken.
    """
    rows = _clients_rows(config)
    picks = np.unique(np.linspace(0, len(rows) - 1, _FINGERPRINT_IMAGES).astype(int))
    images = read_images(rows.select(picks), dataset_info(config), config.name).images
    digest = hashlib.sha256(json.dumps(rows["label"][:]).encode())
    digest.update(images.numpy().tobytes())
    return digest.hexdigest()


def check_test(config: DatasetConfig, num_clients: int) -> None:
    """Refuse a test split that is not there, or has not an image for each client.

    Raises
    ------
    DataError
        As said. No image is decoded.
    """
    count = len(_evaluation_rows(config))
    if count < num_clients:
        raise DataError(
            f"{config.name}: the test split holds {count} images for {num_clients} clients; "
            "allowed: one each, or strategy.fraction_evaluate=0"
        )


def draw_images(config: DatasetConfig, split: str, count: int, seed: int) -> ImageSet:
    """Return images of a split, drawn without replacement; only they are decoded.

    Parameters
    ----------
    config : DatasetConfig
    split : {"train", "test"}
    count : int
        As many, or all if there are not so many.
    seed : int
        >= 0.

    Raises
    ------
    DataError
        If the data is not there or is broken.
    """
    rows = _encoded_split(config, split)
    picks = np.random.default_rng(seed).permutation(len(rows))[:count]
    return read_images(rows.select(picks), dataset_info(config), config.name)


@lru_cache(maxsize=32)
def draw_class(config: DatasetConfig, split: str, label: int, count: int, seed: int) -> Tensor:
    """Return images of one class of a split, drawn without replacement; only they are decoded.

    Parameters
    ----------
    config : DatasetConfig
    split : {"train", "test"}
    label : int
        One that no image has gives no image.
    count : int
        As many, or all if there are not so many.
    seed : int
        >= 0.

    Returns
    -------
    Tensor of uint8, shape (M, C, H, W)
        Shared between callers: don't write into it.

    Raises
    ------
    DataError
        If the data is not there or is broken.
    """
    rows, info = _encoded_split(config, split), dataset_info(config)
    own = np.flatnonzero(np.array(rows["label"][:]) == label)
    if not len(own):
        return torch.empty((0, *info.image_shape), dtype=torch.uint8)
    picks = np.random.default_rng(seed).permutation(own)[:count]
    return read_images(rows.select(picks), info, config.name).images

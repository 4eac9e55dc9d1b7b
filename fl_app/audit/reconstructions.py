"""A run's reconstructions on disk: the tensors behind each picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_app.util.reading import BrokenFileError
from fl_app.util.tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class StoredReconstruction:
    """What an attack found.

    Attributes
    ----------
    images : Tensor, shape (N, C, H, W)
        In [0, 1].
    labels : tuple of int
        N class indices.
    assignment : tuple of int or None
        As in `fl_app.audit.metrics.Leakage`; None where there was no truth.
    """

    images: Tensor
    labels: tuple[int, ...]
    assignment: tuple[int, ...] | None = None

    @property
    def in_order_of_truth(self) -> Tensor:
        """The images as they are assigned, where there is a truth."""
        return self.images if self.assignment is None else self.images[list(self.assignment)]


def tensors_path(picture: Path) -> Path:
    """Return where the tensors behind a picture lie."""
    return picture.with_suffix(".safetensors")


def write_reconstruction(picture: Path, found: StoredReconstruction) -> None:
    """Write the tensors behind a picture, whole or not at all.

    Raises
    ------
    OSError
        If they can't be written.
    """
    tensors = {"images": found.images.contiguous(), "labels": torch.tensor(found.labels)}
    if found.assignment is not None:
        tensors["assignment"] = torch.tensor(found.assignment)
    write_tensors(tensors_path(picture), tensors)


def read_reconstruction(picture: Path) -> StoredReconstruction:
    """Return the reconstruction behind a picture.

    Raises
    ------
    BrokenFileError
        If it can't be read, or is none.
    """
    path = tensors_path(picture)
    tensors, _ = read_tensors(path)
    images, labels, order = (tensors.get(name) for name in ("images", "labels", "assignment"))
    if images is None or not images.is_floating_point() or images.dim() != 4 or not len(images):
        raise BrokenFileError(f"{path} is no reconstruction: it holds no images (N, C, H, W)")
    if images.shape[1] not in (1, 3):
        raise BrokenFileError(f"{path} is no reconstruction: {images.shape[1]} channels")
    count = len(images)
    if not _are_indices(labels, count):
        raise BrokenFileError(f"{path} is no reconstruction: it has not a label an image")
    if order is not None and not (
        _are_indices(order, count) and sorted(order.tolist()) == list(range(count))
    ):
        raise BrokenFileError(f"{path} is no reconstruction: its assignment is none")
    return StoredReconstruction(
        images.float(),
        tuple(labels.tolist()),  # type: ignore[union-attr]
        None if order is None else tuple(order.tolist()),
    )


def _are_indices(tensor: Tensor | None, count: int) -> bool:
    return tensor is not None and tensor.dtype == torch.int64 and tensor.shape == (count,)

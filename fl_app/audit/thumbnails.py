"""Small pictures for a page: images of a run's files as PNGs in data URIs. Free of torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fl_app.audit.leakage_log import observation_of
from fl_app.protocol import observation_id
from fl_app.util.arrays import Array, read_arrays, read_header
from fl_app.util.reading import BrokenFileError, parse_json

SIDE = 64  # pixels that a thumbnail has at most
MOST_BYTES = 6_000_000  # of all thumbnails of a page


@dataclass(frozen=True)
class Thumbnails:
    """The pictures of one attempt, by image; "" where there is none."""

    private: Mapping[int, str]
    found: Mapping[int, str]


Wanted = tuple[Mapping[str, Any], list[int]]
"""A line of the log, and its images."""


def thumbnails(folder: Path, wanted: Iterable[Wanted]) -> Iterator[tuple[Thumbnails, list[str]]]:
    """Yield the pictures of some attempts, each with what could not be read.

    After `MOST_BYTES` none has a picture.

    Parameters
    ----------
    folder : Path
        A run's.
    wanted : iterable of Wanted
        The most important first.
    """
    left = MOST_BYTES
    for line, images in wanted:
        if left <= 0:
            yield Thumbnails({}, {}), []
            continue
        made, problems = _of_line(folder, line, images)
        left -= sum(map(len, [*made.private.values(), *made.found.values()]))
        yield made, problems


def _of_line(
    folder: Path, line: Mapping[str, Any], images: list[int]
) -> tuple[Thumbnails, list[str]]:
    problems: list[str] = []
    found: dict[int, str] = {}
    private: dict[int, str] = {}
    try:
        reconstructed = _reconstructed(folder, line)
        found = _encoded(reconstructed, images)
        if line["metrics"]:
            private = _encoded(_private(folder, line, len(reconstructed)), images)
    except BrokenFileError as error:
        problems.append(str(error))
    return Thumbnails(private, found), problems


def _reconstructed(folder: Path, line: Mapping[str, Any]) -> Array:
    """Return a line's reconstructions, in the order of the private images where it is known."""
    path = (folder / line["picture"]).with_suffix(".safetensors")
    held = read_arrays(path)
    images, order = _images(held, path), held.get("assignment")
    if order is None:
        return images
    if order.shape != (len(images),) or sorted(order.tolist()) != list(range(len(images))):
        raise BrokenFileError(f"{path} is no reconstruction: its assignment is none")
    return images[order]


def _private(folder: Path, line: Mapping[str, Any], count: int) -> Array:
    """Return the private images of a line; those of its clients one after another.

    There is none where the truth lies elsewhere, or was deleted.
    """
    parts = []
    for node in _nodes(folder, line):
        path = folder / "truth" / f"{observation_id(line['round'], node)}.safetensors"
        if not path.is_file():
            return np.empty((0, 3, 1, 1))
        parts.append(_images(read_arrays(path), path))
    if not parts or len({part.shape[1:] for part in parts}) > 1 or sum(map(len, parts)) != count:
        raise BrokenFileError(f"{folder / 'truth'}: its images are not as many as were found")
    return np.concatenate(parts)


def _nodes(folder: Path, line: Mapping[str, Any]) -> list[int]:
    """Return whose images an update is of, in their order."""
    if not line["clients"]:
        return [int(line["node"])]
    path = folder / "observations" / f"{observation_of(line)}.safetensors"
    try:
        facts = parse_json(read_header(path).get("observation", ""), dict[str, Any])
        return [int(node) for node in facts.get("nodes", ())]
    except (ValueError, TypeError) as error:
        raise BrokenFileError(f"{path} is no observation: {error}") from error


def _images(held: Mapping[str, Array], path: Path) -> Array:
    images = held.get("images")
    shaped = images is not None and images.ndim == 4 and images.shape[1] in (1, 3) and images.size
    if images is None or not shaped or images.dtype.kind != "f":
        raise BrokenFileError(f"{path} holds no images (N, C, H, W)")
    return images


def _encoded(images: Array, wanted: list[int]) -> dict[int, str]:
    return {i: data_uri(images[i]) for i in wanted if i < len(images)}


def data_uri(image: Array) -> str:
    """Return an image as a PNG in a data URI, at most `SIDE` pixels high and wide.

    Parameters
    ----------
    image : array, shape (C, H, W)
        In [0, 1], C 1 or 3.
    """
    with np.errstate(invalid="ignore"):
        pixels = np.nan_to_num(image.astype(np.float64)).clip(0, 1)
    bytes_ = np.round(255 * pixels).astype(np.uint8)
    shown = Image.fromarray(bytes_[0] if len(bytes_) == 1 else bytes_.transpose(1, 2, 0))
    if max(shown.size) > SIDE:
        shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

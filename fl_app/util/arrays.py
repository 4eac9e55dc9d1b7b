"""Tensors of a file as NumPy arrays, for what has no need of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fl_app.util.reading import BrokenFileError, check_regular

Array = np.ndarray[Any, np.dtype[Any]]


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the tensors of a safetensors file.

    Raises
    ------
    BrokenFileError
        If it is missing, no file of a disk, cut short or otherwise broken, or holds numbers
        that NumPy has no type for.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise BrokenFileError(f"{path} can't be read: {error}") from error


def read_header(path: Path) -> dict[str, str]:
    """Return the text in a safetensors file's header, and none of its tensors.

    Raises
    ------
    BrokenFileError
        As `read_arrays`.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise BrokenFileError(f"{path} can't be read: {error}") from error

"""Files of tensors: read with checks, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fl_app.util.files import whole_file
from fl_app.util.reading import BrokenFileError, check_regular


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and the text in its header.

    Raises
    ------
    BrokenFileError
        If it is missing, no file of a disk, cut short or otherwise broken.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    # A broken header gets as far as torch, which has errors of its own.
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BrokenFileError(f"{path} can't be read: {error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises
    ------
    OSError
        If it can't be written, for example on a full disk.
    """
    with whole_file(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # its own, for what is an OSError everywhere else
            raise OSError(f"{path} can't be written: {error}") from error

"""A training's checkpoint: a folder of small files, written whole or not at all.

Tensors are in safetensors shards below 16 MB, so that a checkpoint can be moved even
where large files can't. Everything else is one JSON file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_app.util.files import write_text
from fl_app.util.reading import read_json
from fl_app.util.tensors import read_tensors, write_tensors

SHARD_BYTES = 15_000_000  # of tensors; their names come on top


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``folder/checkpoint``, and replace an older one.

    A killed call leaves the old checkpoint or the new one to `load_checkpoint`.

    Parameters
    ----------
    folder : Path
    tensors : mapping of str to Tensor
        On any device, of any layout.
    facts : mapping
        What JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".checkpoint-*"):  # by a killed call
        shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(dir=folder, prefix=".checkpoint-"))
    digests = {}
    for number, names in enumerate(_shards(tensors)):
        shard = new / f"tensors-{number:03}.safetensors"
        write_tensors(shard, {name: tensors[name].cpu().contiguous() for name in names})
        digests[shard.name] = _digest(shard)
    write_text(new / "checkpoint.json", json.dumps({**facts, "sha256": digests}, indent=1) + "\n")
    current, old = _places(folder)
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and facts of a folder's checkpoint; None where there is none.

    Raises
    ------
    ValueError
        If one of its files is missing, broken or of another checkpoint.
    """
    path = next((place for place in _places(folder) if place.exists()), None)
    if path is None:
        return None
    tensors: dict[str, Tensor] = {}
    try:
        facts = read_json(path / "checkpoint.json", dict[str, Any])
        for name, digest in facts.pop("sha256").items():
            if _digest(path / name) != digest:
                raise ValueError(f"{name} is cut short, or of another checkpoint")
            tensors |= read_tensors(path / name)[0]
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint {path} can't be resumed: {error}. Copy all of its files again, "
            "or choose another folder to start again"
        ) from error
    return tensors, facts


def _places(folder: Path) -> tuple[Path, Path]:
    """Return the path of a checkpoint, and its path while a newer one replaces it."""
    return folder / "checkpoint", folder / ".checkpoint.old"


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of the tensors by shard, in order; a larger tensor has its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

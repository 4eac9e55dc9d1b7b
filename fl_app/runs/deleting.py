"""Run folders' end: what one holds, and its removal, whole or of what is private. Free of torch."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_app.runs.lock import LOCK_FILE, only_one
from fl_app.util.files import whole_file

_CONFIG = "config.yaml"
_LOG = "leakage.jsonl"
# What runs, attacks and commands leave in a run's folder: nothing else is ever removed.
PRIVATE = (
    "truth", "observations", "reconstructions", "queue", "advise", "tensorboard", "comparison.png",
    "report.html", "images.csv", "images.parquet",
)  # fmt: skip
KEPT = (
    "models", "training.json", "rounds.md", "rounds.png", "comparison.md", "comparison.json",
    "advise.json", "advise.svg", "report-redacted.html", LOCK_FILE, _LOG, _CONFIG,
)  # fmt: skip
# What a killed process leaves of these, see `whole_file`.
_TEMPORARY = re.compile(r"\.[a-z0-9_]{8}\.(yaml|jsonl?|md|png|svg|html|csv|parquet)")
_LONGEST_HEADER = 2**20  # bytes, of a safetensors file
_GONE = "deleted by flowleak delete --private-only"


@dataclass(frozen=True)
class Part:
    """A file or folder right inside a run's folder.

    Attributes
    ----------
    path : Path
        Its whole path.
    files, bytes : int
        How many files, and what they take on the disk.
    """

    path: Path
    files: int
    bytes: int


def disk_bytes(path: Path) -> int:
    """Return what a file, or a folder with all in it, takes on the disk; links are not followed."""
    return _size(path)[1]


def parts(run_dir: Path, private_only: bool = False) -> list[Part]:
    """Return what `delete_run` would remove, in the order in which it does.

    Raises
    ------
    ValueError
        If the folder is no run's, or a link.
    """
    _check(run_dir)
    names = [*PRIVATE, *([] if private_only else KEPT)]
    found = [run_dir / name for name in names]
    temporary = sorted(path for path in run_dir.iterdir() if _TEMPORARY.fullmatch(path.name))
    there = [path for path in [*temporary, *found] if os.path.lexists(path)]
    return [Part(path, *_size(path)) for path in there]


def private_images(run_dir: Path) -> int | None:
    """Return how many private images the clients left; None where a file can't be read."""
    files = _inside(run_dir / "truth", ".safetensors")
    counts = [_images(path) for path in files]
    return None if None in counts else sum(count for count in counts if count)


def delete_run(run_dir: Path, private_only: bool = False) -> list[Path]:
    """Remove a run's folder, or what in it shows private images or leads to them.

    Links are removed, and what they point to stays. The configuration goes last, so
    that what was cut short can be repeated.

    Parameters
    ----------
    run_dir : Path
    private_only : bool
        Keep the scores: the log, whose lines lose their pictures and the images' classes, the
        configuration, the tables and the global models.

    Returns
    -------
    list of Path
        What is left, for no run makes it. It may show private images, too.

    Raises
    ------
    ValueError
        If the folder is no run's, or a process attacks the run.
    """
    _check(run_dir)
    with only_one(run_dir, wait=False):
        for part in parts(run_dir, private_only):
            _remove(part.path)
        if private_only:
            _forget(run_dir / _LOG)
        kept = KEPT if private_only else ()
        left = sorted(path for path in run_dir.iterdir() if path.name not in kept)
    if not left and not private_only:
        run_dir.rmdir()
    return left


def _check(run_dir: Path) -> None:
    """Refuse a folder that is not plainly a run's, whatever else it may hold."""
    if run_dir.is_symlink():
        raise ValueError(f"{run_dir} is a link to {run_dir.resolve()}; links are not followed")
    config = run_dir / _CONFIG
    try:
        text = config.read_bytes() if config.is_file() and not config.is_symlink() else b""
    except OSError as error:
        raise ValueError(f"{config} can't be read: {error}") from error
    # As `create_run` writes them; whatever else is damaged in it.
    if not all(re.search(rb"(?m)^" + key + rb":", text) for key in (b"started", b"versions")):
        raise ValueError(f"{run_dir} is no run's folder: it holds no {_CONFIG} of a run")


def _size(path: Path) -> tuple[int, int]:
    """Return how many files a path holds, itself if it is one, and their bytes on the disk."""
    if path.is_symlink() or not path.is_dir():
        return 1, _blocks(path)
    files, size = 0, _blocks(path)
    for folder, folders, names in os.walk(path):
        files += len(names)
        size += sum(_blocks(Path(folder, name)) for name in (*folders, *names))
    return files, size


def _blocks(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0  # a run goes on meanwhile


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)  # follows no link


def _inside(folder: Path, suffix: str) -> Sequence[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == suffix)


def _images(path: Path) -> int | None:
    """Return how many images a Truth holds, from its header alone; None where it is damaged."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
        return int(header["images"]["shape"][0])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _forget(log: Path) -> None:
    """Take pictures and classes out of each line; what is no line stays as it is."""
    if log.is_symlink() or not log.is_file():
        return
    before = log.read_bytes()
    after = b"\n".join(_without_private(raw) for raw in before.split(b"\n"))
    if after != before:
        with whole_file(log) as temporary:
            temporary.write_bytes(after)


def _without_private(raw: bytes) -> bytes:
    """Return a line without what is private: the classes that were found are the images', too."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    if not isinstance(line, dict):
        return raw
    gone = [name for name in ("picture", "true_labels") if line.get(name) is not None]
    alone, reasons = line.get("reference_free"), line.get("reasons")
    counted = isinstance(alone, dict) and alone.pop("label_counts", None)
    if not gone and not counted and not line.get("found_labels"):
        return raw
    reasons = reasons if isinstance(reasons, dict) else {}
    found = {"found_labels": [], "reasons": {**reasons, **dict.fromkeys(gone, _GONE)}}
    return json.dumps(line | found | dict.fromkeys(gone)).encode()

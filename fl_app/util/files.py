"""Finding the project's own files, and writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from fl_app.util.origin import ROOT, editable_folder, origin

RUNS_DIR = "runs"
"""The default of the setting runs_dir."""


def _roots() -> Iterator[Path]:
    """Yield the folders that may hold the project's files, nearest first."""
    yield ROOT
    # Flower runs an unpacked copy of the app that lacks every binary file, so
    # look in the checkout that it was made of, and beside the installed distribution.
    for folder in (origin().checkout, editable_folder()):
        if folder:
            yield folder
    try:
        site = Path(str(metadata.distribution("flowleak").locate_file("")))
    except metadata.PackageNotFoundError:
        return
    yield site
    yield site / "fl_app"  # conf/ is packed inside fl_app in a wheel


def user_path(path: str) -> Path:
    """Return a path from the configuration as an absolute one: the one rule for all of them.

    The server, the clients and the attacks run in processes whose working folders
    differ, and none need be where `flwr run` was typed, see `origin`.

    Parameters
    ----------
    path : str
        Absolute, from the home folder (``~``), or relative: to the folder where the command
        was typed.
    """
    return (origin().folder / Path(path).expanduser()).absolute()


def runs_folder(runs_dir: str = RUNS_DIR) -> Path:
    """Return the folder that holds the runs.

    Parameters
    ----------
    runs_dir : str
        As in the configuration. Where it is the default, the variable ``FLOWLEAK_RUNS``
        names the folder, if it is set.
    """
    return user_path(origin().runs or runs_dir) if runs_dir == RUNS_DIR else user_path(runs_dir)


def project_file(relative: str) -> Path:
    """Return the path of a file or folder that the project ships.

    Parameters
    ----------
    relative : str
        Path from the project's top level, for example ``conf/config.yaml``.

    Raises
    ------
    FileNotFoundError
        If none of the places holds it; the message names them.
    """
    places = [root / relative for root in _roots()]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"{relative} is part of flowleak but was not found; looked at "
        + ", ".join(str(place) for place in places)
        + ". Install the project with `pip install -e .`"
    )


def private_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for its owner alone.

    One that exists stays as it is.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block succeeds.

    A reader never sees a half-written file: a full disk or a killed process
    leaves the old file, or none. Only its owner can read it, see also `private_folder`.
    """
    private_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all (UTF-8)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

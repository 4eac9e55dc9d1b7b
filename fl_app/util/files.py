"""Finding the project's own files, and writing files whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse


def _origin() -> tuple[Path, bool] | None:
    """Return the folder that flowleak was installed from, and whether editable."""
    try:
        text = metadata.distribution("flowleak").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    facts = json.loads(text) if text else {}
    url = urlparse(facts.get("url", ""))
    if url.scheme != "file":
        return None
    return Path(unquote(url.path)), bool(facts.get("dir_info", {}).get("editable"))


def _roots() -> Iterator[Path]:
    """Yield the folders that may hold the project's files, nearest first."""
    yield Path(__file__).resolve().parents[2]
    # Flower runs an unpacked copy of the app that lacks every binary file, so
    # look beside the installed distribution as well.
    origin = _origin()
    if origin:
        yield origin[0]
    try:
        site = Path(str(metadata.distribution("flowleak").locate_file("")))
    except metadata.PackageNotFoundError:
        return
    yield site
    yield site / "fl_app"  # conf/ is packed inside fl_app in a wheel


def user_path(path: str) -> Path:
    """Return a path from the configuration as an absolute one: the one rule for all of them.

    The server, the clients and the attacks run in processes whose working folders
    differ, and none is where `flwr run` was typed: a Flower app's is where its
    SuperLink was once started. So they do not count where there is anything better.
    What is typed as an argument of the command `flowleak` is made absolute there.

    Parameters
    ----------
    path : str
        Absolute, from the home folder (``~``), or relative: to the project's
        folder where it is installed editable, else to the working folder.
    """
    origin = _origin()
    base = origin[0] if origin and origin[1] else Path.cwd()
    return (base / Path(path).expanduser()).absolute()


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

"""Where the code that runs came from, and the folder that relative paths are from.

A command's is the working folder. Flower, however, runs an unpacked copy of the project, its
bundle, in a process whose working folder and environment are those of the first `flwr run`
of all: there the folder has to be found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlparse

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the packages that run."""

RUNS = "FLOWLEAK_RUNS"
"""The variable that names a folder for all runs."""

PACKAGES = ("flowleak", "fl_app", "client_app", "server_strategies")
_UNSENT = Path("fl_app", "benchmarks")  # Flower's bundle lacks them
_BUNDLE = re.compile(r"flowleak\.flowleak\..+\.[0-9a-f]{8}")  # its folder, in Flower's apps/
_SHARED = "FLOWLEAK_ORIGIN"  # for this process's children: clients and attack workers


@dataclass(frozen=True)
class Origin:
    """What is known of the command that this process works for.

    Attributes
    ----------
    folder : Path
        Relative paths are from it.
    checkout : Path or None
        Holds the code that runs; None: no folder that is known does.
    runs : str
        The variable `RUNS`; "": it is not set.
    doubt : str
        Why `folder` may be another than where the command was typed; "": it is that.
    """

    folder: Path
    checkout: Path | None
    runs: str = ""
    doubt: str = ""


@dataclass(frozen=True)
class FlwrRun:
    """A living process `flwr run`.

    Attributes
    ----------
    folder : Path
        Where it was typed.
    app : Path
        The checkout that it runs.
    runs : str
        The variable `RUNS` there.
    started : int
        For the order.
    """

    folder: Path
    app: Path
    runs: str
    started: int


def origin() -> Origin:
    """Return what is known of the command that this process works for.

    A process of Flower finds it once, and its children inherit it.
    """
    runs = os.environ.get(RUNS, "")
    if not (ROOT.parent.name == "apps" and _BUNDLE.fullmatch(ROOT.name)):
        return Origin(Path.cwd(), ROOT if (ROOT / "pyproject.toml").is_file() else None, runs)
    found = _inherited()
    if found is None:
        found = choose(ROOT, flwr_runs(), _places(), runs)
        facts = {"root": str(ROOT), "folder": str(found.folder), "runs": found.runs}
        facts |= {"checkout": str(found.checkout or ""), "doubt": found.doubt}
        os.environ[_SHARED] = json.dumps(facts)
    return found


def _places() -> list[tuple[Path, str]]:
    """Return where a bundle may have come from, and what each is, in words."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed after Flower had been started there
        here = Path(os.environ.get("PWD", Path.home()))
    editable = editable_folder()
    places = [(here, "where Flower was first started")]
    if editable:
        places.append((editable, "what is installed editable"))
    # The shell may still be where its `flwr run` was.
    folders = {folder for folder in _of_processes(_folder) if (folder / "pyproject.toml").is_file()}
    return places + [(folder, "the folder of a process of yours") for folder in sorted(folders)]


def _inherited() -> Origin | None:
    """Return what a parent has found for the same bundle, None where it has not."""
    facts = json.loads(os.environ.get(_SHARED, "{}"))
    if facts.get("root") != str(ROOT):
        return None
    checkout = Path(facts["checkout"]) if facts["checkout"] else None
    return Origin(Path(facts["folder"]), checkout, facts["runs"], facts["doubt"])


def choose(
    root: Path,
    typed: Iterable[FlwrRun],
    places: Sequence[tuple[Path, str]],
    runs: str = "",
) -> Origin:
    """Return where a bundle came from: a folder counts only if its code is that of the bundle.

    Parameters
    ----------
    root : Path
        The bundle's folder.
    typed : iterable of FlwrRun
        Those that live; where several fit, the latest is taken.
    places : sequence of (Path, str)
        Other folders, the likeliest first, and what each is, in words.
    runs : str
        The variable `RUNS` of this process.
    """
    fitting = sorted((run for run in typed if same_code(root, run.app)), key=lambda r: r.started)
    if fitting:
        found = fitting[-1]
        others = sorted({str(run.folder) for run in fitting} - {str(found.folder)})
        doubt = f"`flwr run` lives in {', '.join([str(found.folder), *others])}" if others else ""
        return Origin(found.folder, found.app, found.runs, doubt)
    for folder, words in places:
        if same_code(root, folder):
            return Origin(folder, folder, runs, f"`flwr run` has ended; {folder} is {words}")
    doubt = f"no folder here holds the code that runs; Flower was first started in {places[0][0]}"
    return Origin(places[0][0], None, runs, doubt)


def flwr_runs() -> list[FlwrRun]:
    """Return this user's living processes `flwr run` that began before this one; on Linux."""
    found = [run for run in _of_processes(_flwr_run) if run]
    return [run for run in found if run.started <= _started(Path("/proc/self"))]


def _of_processes(read: Callable[[Path], T]) -> list[T]:
    """Return what can be read from each of this user's processes, in /proc; on Linux."""
    found = []
    for process in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        try:
            if process.stat().st_uid == os.getuid():
                found.append(read(process))
        except (OSError, ValueError):
            continue  # it has just ended
    return found


def _folder(process: Path) -> Path:
    return Path(os.readlink(process / "cwd"))


def _flwr_run(process: Path) -> FlwrRun | None:
    words = (process / "cmdline").read_text(errors="replace").split("\0")
    heads = [i for i in range(len(words) - 1) if Path(words[i]).name == "flwr"][:1]
    if not heads or words[heads[0] + 1] != "run":
        return None
    folder = _folder(process)
    # The app is an argument among others, "." by default.
    named = (folder / word for word in words[heads[0] + 2 :] if word and not word.startswith("-"))
    app = next((path for path in named if (path / "pyproject.toml").is_file()), folder)
    variables = (process / "environ").read_text(errors="replace").split("\0")
    runs = next((v.partition("=")[2] for v in variables if v.startswith(f"{RUNS}=")), "")
    return FlwrRun(folder, app.resolve(), runs, _started(process))


def _started(process: Path) -> int:
    """Return when a process began, in the kernel's ticks."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[19])


def editable_folder() -> Path | None:
    """Return the folder that flowleak is installed from editable; None: it is installed as a copy.

    A copy does not read the folder that it was built from, which may have changed since.
    """
    try:
        text = metadata.distribution("flowleak").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    facts = json.loads(text) if text else {}
    url = urlparse(facts.get("url", ""))
    if url.scheme != "file" or not facts.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(url.path))


def code_digest() -> str:
    """Return the SHA-256 of the code and the settings that run.

    It is that of a list as ``sha256sum`` prints it, sorted by name: of every ``.py`` in
    `PACKAGES`, benchmarks aside, and of every ``.yaml`` in ``conf/``.
    """
    lines = (f"{digest}  {name}\n" for name, digest in sorted(_code(ROOT).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def same_code(root: Path, folder: Path) -> bool:
    """Say whether a folder holds every file of code and settings that lies in `root`, alike."""
    code = _code(root)
    try:
        return bool(code) and all(_digest(folder / name) == code[name] for name in code)
    except OSError:
        return False


@cache
def _code(root: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its path from `root`."""
    return {path.relative_to(root).as_posix(): _digest(path) for path in _code_paths(root)}


def _code_paths(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            if root / _UNSENT not in path.parents:
                yield path
    for conf in ("conf", "fl_app/conf"):  # in a wheel it is inside a package
        yield from (root / conf).rglob("*.yaml")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

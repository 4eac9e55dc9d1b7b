"""Run folders: one for each run, never used twice."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fl_app.config import Config, to_yaml
from fl_app.util.files import project_file, user_path, write_text

_PACKAGES = ("flowleak", "flwr", "torch", "ray", "numpy")


def create_run(config: Config) -> Path:
    """Make the folder of a new run, with its resolved configuration in it.

    Returns
    -------
    Path
        Absolute: ``runs_dir/name``, or ``name-2``, ``name-3``, ... where taken.
        Only its owner can enter it, for it holds private images.
    """
    runs_dir = user_path(config.runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        run_dir = runs_dir / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            run_dir.mkdir(mode=0o700)
            break
        except FileExistsError:
            number += 1
    versions = {package: _version(package) for package in _PACKAGES}
    extra = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions},
    }
    write_text(run_dir / "config.yaml", to_yaml(replace(config, runs_dir=str(runs_dir)), extra))
    for folder in ("observations", "reconstructions", *(["truth"] if config.audit.truth else [])):
        (run_dir / folder).mkdir(mode=0o700)
    return run_dir


def list_runs(runs_dir: Path) -> list[Path]:
    """Return the run folders in `runs_dir`, oldest first; none where it does not exist."""
    started: dict[Path, int] = {}
    for config in (run / "config.yaml" for run in _entries(runs_dir)):
        with suppress(OSError):  # no run's, or nobody may look into it
            started[config.parent] = config.lstat().st_mtime_ns  # what a link leads to may be gone
    return sorted(started, key=lambda run: (started[run], run.name))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def find_run(runs_dir: Path, name: str) -> Path:
    """Return a run's folder.

    Raises
    ------
    FileNotFoundError
        If there is no such run; the message names those that there are.
    """
    runs = {run.name: run for run in list_runs(runs_dir)}
    if name not in runs:
        raise FileNotFoundError(
            f"no run {name!r} in {runs_dir.absolute()}; there: {', '.join(runs) or 'none'}"
        )
    return runs[name]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the checkout's commit, with ``-dirty`` after it where files differ from it."""
    try:
        checkout = project_file(".git").parent
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=checkout, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git
    return described.stdout.strip()

"""Run folders: one for each run, never used twice."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fl_app.config import Config, to_yaml
from fl_app.util.files import private_folder, runs_folder, user_path, write_text
from fl_app.util.origin import PACKAGES, code_digest, origin

DESCRIBED = "described"
"""The entry of config.yaml, in a run of a user's own federation, that names its file and model."""

_PACKAGES = (
    "flowleak", "flwr", "torch", "ray", "numpy", "scipy", "torchvision", "lpips", "opacus",
    "omegaconf", "safetensors", "datasets", "flwr-datasets", "pillow", "scikit-image",
)  # fmt: skip


def create_run(config: Config, facts: Mapping[str, Any] | None = None) -> Path:
    """Make the folder of a new run, with its resolved configuration in it.

    Parameters
    ----------
    config : Config
    facts : mapping, optional
        What config.yaml is to say beside the settings, see `run_facts`.

    Returns
    -------
    Path
        Absolute: ``runs_dir/name``, or ``name-2``, ``name-3``, ... where taken.
        Only its owner can enter it, for it holds private images.
    """
    runs_dir = runs_folder(config.runs_dir)
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
        "code_sha256": code_digest(),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions},
        **(facts or {}),
    }
    write_text(run_dir / "config.yaml", to_yaml(replace(config, runs_dir=str(runs_dir)), extra))
    for folder in ("observations", "reconstructions", *(["truth"] if config.audit.truth else [])):
        private_folder(run_dir / folder)
    return run_dir


def anchored(config: Config) -> Config:
    """Return the configuration with whole paths: it will be read in other processes and folders."""

    def whole(path: str) -> str:
        return str(user_path(path)) if path.endswith(".safetensors") else path

    source, lpips = config.dataset.source, config.audit.lpips_weights
    if source and user_path(source).is_dir():  # else the hub's name
        source = str(user_path(source))
    if lpips not in ("", "download"):
        lpips = str(user_path(lpips))
    return replace(
        config,
        start_from=whole(config.start_from),
        dataset=replace(config.dataset, source=source),
        prior=replace(config.prior, weights=whole(config.prior.weights)),
        audit=replace(config.audit, lpips_weights=lpips),
    )


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

    Parameters
    ----------
    runs_dir : Path
        Where runs are looked for by their names.
    name : str
        A run's name, or the path of its folder. A name comes first.

    Raises
    ------
    FileNotFoundError
        If there is no such run; the message names those that there are.
    """
    runs = {run.name: run for run in list_runs(runs_dir)}
    if name in runs:
        return runs[name]
    if name and (Path(name) / "config.yaml").is_file():
        return Path(name).absolute()
    raise FileNotFoundError(
        f"no run {name!r} in {runs_dir.absolute()}; there: {', '.join(runs) or 'none'}"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the code that runs, with ``-dirty`` after it where it differs from it.

    None where no checkout is known to hold the files that run.
    """
    checkout = origin().checkout
    if not checkout or not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--", *PACKAGES, "conf")
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no commit yet
    return f"{commit}-dirty" if changed else commit


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=checkout, capture_output=True, text=True, timeout=10, check=True,
    )  # fmt: skip
    return done.stdout.strip()

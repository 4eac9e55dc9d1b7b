"""What the sign-off box holds: which files the report is of, and what made them. Free of torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fl_app.report.source import Source

EVIDENCE = (
    "config.yaml", "leakage.jsonl", "models", "observations", "reconstructions", "training.json",
    "truth",
)  # fmt: skip
"""What the hash is of, of a run's folder. What attacks, scores or deletes later changes it."""


def evidence_digest(folder: Path) -> str:
    """Return one SHA-256 for a run's files, see `EVIDENCE`.

    It is what these commands print, in the run's folder::

        find EVIDENCE -type f 2>/dev/null | LC_ALL=C sort | xargs sha256sum | sha256sum

    Raises
    ------
    OSError
        If a file can't be read.
    """
    whole = hashlib.sha256()
    for name in sorted(_files(folder), key=os.fsencode):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{digest}  {name}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of a run's files, from its folder; no links, pipes or devices."""
    for name in EVIDENCE:
        path = folder / name
        found = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
        yield from (
            file.relative_to(folder).as_posix()
            for file in found
            if file.is_file() and not file.is_symlink()
        )


def signed(source: Source, written: str) -> tuple[tuple[str, str], ...]:
    """Return what identifies a run and its report, by name."""
    try:
        digest = evidence_digest(source.folder)
    except OSError as error:
        digest = f"not made: {error}"
    versions = {
        "flowleak": source.setting("versions", "flowleak"),
        "Flower": source.setting("versions", "flwr"),
        "torch": source.setting("versions", "torch"),
        "Python": source.setting("versions", "python"),
    }
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    code = source.setting("git_commit") or source.setting("code_sha256")
    return (
        ("Run", source.folder.name),
        ("Started", source.setting("started") or "unknown"),
        ("Seed", source.setting("seed") or "unknown"),
        ("SHA-256 of its files", digest),
        ("Made by", known or "unknown"),
        ("Code", code or "unknown"),
        ("Report", f"{written}, flowleak {metadata.version('flowleak')}"),
    )

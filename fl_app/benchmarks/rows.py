"""Rows of results, kept in a file with what they depend on."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fl_app.benchmarks.provenance import UNKNOWN
from fl_app.util.files import whole_file
from fl_app.util.machine import host

Row = dict[str, Any]

SUFFIXES = (".json", ".json.xz")
"""Of a results file; the latter is compressed."""

MADE_BY = ("commit", "version", "code")
"""Facts of what made a row, which each row says of itself."""

# What is measured in parts, over several versions, says so: these may differ in one file.
_MAY_DIFFER = ("workers", "threads", *MADE_BY)

_DIGITS = 6  # of a kept number: more than any table shows, in a third of the bytes


def kept_results(path: Path, facts: Mapping[str, Any], beside: Sequence[str] = ()) -> Row:
    """Return the content of a results file; each of its rows says what made it.

    Parameters
    ----------
    path : Path
    facts : mapping
        What the results that are wanted depend on.
    beside : sequence of str
        Facts that need not be the same, beside how the work was shared out and `MADE_BY`.

    Raises
    ------
    ValueError
        If the file's facts are others.
    """
    data = path.read_bytes()
    kept: Row = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
    theirs, ours = (
        {k: v for k, v in of.items() if k not in (*_MAY_DIFFER, *beside)}
        for of in (kept["facts"], facts)
    )
    if theirs != ours:
        raise ValueError(f"{path} holds results of {theirs}, not of {ours}; choose another --out")
    return {**kept, "rows": [with_facts(row, kept["facts"]) for row in kept["rows"]]}


def keep_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content of a results file, whole or not at all."""
    packed = path.suffix == ".xz"
    text = json.dumps(content, indent=None if packed else 1) + "\n"
    with whole_file(path) as temporary:
        temporary.write_bytes(lzma.compress(text.encode()) if packed else text.encode())


def file_beside(path: Path, suffix: str) -> Path:
    """Return the path of a file beside a results file, named alike but for its suffix."""
    return path.with_name(path.name.removesuffix(".xz")).with_suffix(suffix)


def with_facts(row: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
    """Return a row, rounded, with what made it: its own facts, or those that are given."""
    made = {key: facts.get(key, UNKNOWN) for key in MADE_BY}
    kept: Row = _rounded({**made, **row})
    return kept


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def in_words(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Return what rows say under a key, with counts where they differ."""
    said = [str(row.get(key, UNKNOWN)) or "none" for row in rows]
    return ", ".join(
        f"{each} ({said.count(each)} of {len(said)} rows)" if len(set(said)) > 1 else each
        for each in dict.fromkeys(said)
    )


def made_by(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the `MADE_BY` of rows in words."""
    return {key: in_words(rows, key) for key in MADE_BY}


def machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores, versions, threads and device."""
    return {
        **host(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }

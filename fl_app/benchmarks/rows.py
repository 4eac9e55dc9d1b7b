"""Rows of results, kept in a file with what they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fl_app.util.machine import host

Row = dict[str, Any]

# What is measured in parts, over several versions, says so: these may differ in one file.
_MAY_DIFFER = ("workers", "threads", "commit")


def kept_results(path: Path, facts: Mapping[str, Any], beside: Sequence[str] = ()) -> Row:
    """Return the content of a results file; each of its rows has the commit that made it.

    Parameters
    ----------
    path : Path
    facts : mapping
        What the results that are wanted depend on.
    beside : sequence of str
        Facts that need not be the same, beside how the work was shared out and the commit.

    Raises
    ------
    ValueError
        If the file's facts are others.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = (
        {k: v for k, v in of.items() if k not in (*_MAY_DIFFER, *beside)}
        for of in (kept["facts"], facts)
    )
    if theirs != ours:
        raise ValueError(f"{path} holds results of {theirs}, not of {ours}; choose another --out")
    return {**kept, "rows": [with_commit(row, kept["facts"]) for row in kept["rows"]]}


def with_commit(row: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
    """Return a row with the commit that made it: its own, or that of the facts."""
    return {"commit": facts.get("commit", "unknown"), **row}


def commits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the commits that rows are of, in words."""
    made = [row.get("commit", "unknown") for row in rows]
    return ", ".join(
        f"{commit} ({made.count(commit)} of {len(made)} rows)" if len(set(made)) > 1 else commit
        for commit in dict.fromkeys(made)
    )


def machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores, versions, threads and device."""
    return {
        **host(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }

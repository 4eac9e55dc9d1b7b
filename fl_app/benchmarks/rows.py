"""Rows of results, kept in a file with what they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def kept_rows(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a results file, each with the commit that made it.

    Parameters
    ----------
    path : Path
    facts : mapping
        What the results that are wanted depend on. How the work was shared out, and the
        commit, may be others: what is measured in parts, over several versions, says so.

    Raises
    ------
    ValueError
        If the file's facts are others.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = (
        {k: v for k, v in of.items() if k not in ("workers", "threads", "commit")}
        for of in (kept["facts"], facts)
    )
    if theirs != ours:
        raise ValueError(f"{path} holds results of {theirs}, not of {ours}; choose another --out")
    return [with_commit(row, kept["facts"]) for row in kept["rows"]]


def with_commit(row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the commit that made it: its own, or that of the facts."""
    return {"commit": facts.get("commit", "unknown"), **row}


def commits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the commits that rows are of, in words."""
    made = [row.get("commit", "unknown") for row in rows]
    return ", ".join(
        f"{commit} ({made.count(commit)} of {len(made)} rows)" if len(set(made)) > 1 else commit
        for commit in dict.fromkeys(made)
    )

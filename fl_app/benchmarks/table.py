"""Tables of results: numbers with intervals, Markdown, and what a figure depends on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch


def half_width(interval: Mapping[str, float | None], digits: int) -> str:
    """Return half the width of an interval in words; nothing for a single draw."""
    low, high = interval["low"], interval["high"]
    return "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"


def signed(gain: Mapping[str, float | None] | None, digits: int) -> str:
    """Return a paired difference in words; nothing where there is none."""
    return f"{gain['mean']:+.{digits}f}{half_width(gain, digits)}" if gain else ""


def machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores, device and versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "flowleak")},
    }


def results_markdown(
    name: str,
    command: str,
    cells: Sequence[Sequence[str]],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Return a benchmark's table in Markdown, between its command and what it depends on.

    Parameters
    ----------
    name, command : str
        The benchmark, and what makes the table.
    cells : sequence of sequence of str
        The table's lines, its head first.
    facts : mapping
        What the results depend on; they win over `machine`'s.
    notes : sequence of str
        Lines below the table.
    """
    lines = markdown_table(cells)
    return sections_markdown(name, command, [*lines, "", *notes] if notes else lines, facts)


def sections_markdown(
    name: str, command: str, lines: Sequence[str], facts: Mapping[str, Any]
) -> str:
    """Return lines of Markdown between the command that makes them and what they depend on.

    Parameters are those of `results_markdown`, with `lines` for its table and notes.
    """
    said = ", ".join(f"{key} {value}" for key, value in {**machine(), **facts}.items())
    return "\n".join([f"# {name}", "", f"`{command}`", "", *lines, "", said, ""])


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines in Markdown; the first of `cells` is its head."""
    head, *rows = cells
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]

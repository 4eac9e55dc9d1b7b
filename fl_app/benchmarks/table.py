"""Tables of results: Markdown, and what a figure depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fl_app.util.machine import host
from fl_app.util.markdown import markdown_table, sections_markdown


def machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores, versions, threads and device."""
    return {
        **host(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
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
    if notes:
        lines += ["", *notes]
    return sections_markdown(name, command, lines, {**machine(), **facts})

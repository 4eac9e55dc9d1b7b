"""Tables of results in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def sections_markdown(
    name: str, command: str, lines: Sequence[str], facts: Mapping[str, Any]
) -> str:
    """Return lines of Markdown between the command that makes them and what they depend on.

    Parameters
    ----------
    name, command : str
        The heading, and what makes the lines.
    lines : sequence of str
    facts : mapping
        What the results depend on.
    """
    said = ", ".join(f"{key} {value}" for key, value in facts.items())
    return "\n".join([f"# {name}", "", f"`{command}`", "", *lines, "", said, ""])


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines in Markdown; the first of `cells` is its head."""
    head, *rows = ([cell.replace("|", r"\|") for cell in line] for line in cells)
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]

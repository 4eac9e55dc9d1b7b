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


def narrowed(cells: Sequence[Sequence[str]]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """Take the columns out of a table in which all lines say the same, or nothing.

    Parameters
    ----------
    cells : sequence of sequence of str
        The first is the head.

    Returns
    -------
    tuple of (list of (str, str), list of list of str)
        Head and value of what all lines say, and the table of the other columns. A table of one
        line keeps its columns, but for empty ones.
    """
    head, *lines = cells
    columns = list(zip(head, *lines, strict=True))
    alike = [column for column in columns if len(set(column[1:])) == 1]
    said = [(name, value) for name, value, *_ in alike if value and len(lines) > 1]
    gone = {name for name, _ in said} | {name for name, value, *_ in alike if not value}
    kept = [place for place, name in enumerate(head) if name not in gone]
    return said, [[line[place] for place in kept] for line in cells]

"""Tables of results in Markdown, and figures with their intervals in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def half_width(interval: Mapping[str, float | None], digits: int) -> str:
    """Return half the width of an interval in words; nothing for a single value."""
    low, high = interval["low"], interval["high"]
    return "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"


def signed(gain: Mapping[str, float | None] | None, digits: int) -> str:
    """Return a paired difference in words; nothing where there is none."""
    return f"{gain['mean']:+.{digits}f}{half_width(gain, digits)}" if gain else ""


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

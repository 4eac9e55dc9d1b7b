"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fl_app.util.tables import Fitting

_MOST_PROBLEMS = 20  # that are said one by one
_WIDE = 100_000  # characters: more than any line has


def screen() -> Console:
    """Return the console of standard output; in a file or a pipe nothing is cut or wrapped."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def tell(words: str) -> None:
    """Print what is to be known beside a command's result, to standard error."""
    typer.secho(words, fg="yellow", err=True)


def table_of(cells: Sequence[Sequence[str]]) -> Fitting:
    """Return a table for a terminal of any width; the first of `cells` is its head."""
    from rich.table import Table
    from rich.text import Text

    from fl_app.util.tables import Fitting

    table = Table()
    for heading in cells[0]:
        table.add_column(heading, overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # Text, not str: a name may look like rich's markup
    return Fitting(table)


def warn(problems: Iterable[object]) -> None:
    """Say on standard error what was left out, and why."""
    said = [str(each) for each in problems]
    for words in said[:_MOST_PROBLEMS]:
        tell(words)
    if len(said) > _MOST_PROBLEMS:
        tell(f"and {len(said) - _MOST_PROBLEMS} more")


def print_json(objects: Sequence[Mapping[str, Any]]) -> None:
    """Print a list of objects as strict JSON.

    Raises
    ------
    ValueError
        If a number is not finite.
    """
    typer.echo(json.dumps(list(objects), indent=1, allow_nan=False))

"""Tables for terminals of any width. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_FEWEST = 6  # characters of a column in which words can be read


@dataclass(frozen=True)
class Fitting:
    """A table where it can be read, else its rows one below the other: a cell a line.

    Attributes
    ----------
    table : Table
        Of text.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what suits the width that there is."""
        columns = [[str(column.header), *map(str, column.cells)] for column in self.table.columns]
        lines = [[line for cell in column for line in cell.splitlines()] for column in columns]
        needed = sum(min(_FEWEST, max(map(cell_len, each), default=0)) for each in lines)
        lines_between = len(columns) - 1 + 2 * self.table.show_edge if self.table.box else 0
        if needed + lines_between <= options.max_width:
            yield self.table
            return
        heads = [" ".join(column[0].replace("-\n", "").split()) for column in columns]
        if self.table.title:
            yield Text(f"{self.table.title}\n")
        for number, row in enumerate(self.table.rows, start=1):
            cells = [column[number] for column in columns]
            said = [f"{head}: {cell}" if head else cell
                    for head, cell in zip(heads, cells, strict=True) if cell]  # fmt: skip
            yield Text("\n".join(said), style=row.style or "")
            yield Text()
        if self.table.caption:
            yield self.table.caption

"""What made the tables of a folder, and whether by the code that runs: `flowleak bench status`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_app.benchmarks.provenance import UNKNOWN, Provenance

_NO_TABLE = "README.md"
_COLUMNS = ("trials", "version", "code", "prior", "command")
_UNSAID = Provenance(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)


@dataclass(frozen=True)
class KeptTable:
    """A table that a benchmark wrote.

    Attributes
    ----------
    file : Path
    command : str
        What makes it.
    provenance : Provenance
    """

    file: Path
    command: str
    provenance: Provenance


def kept_tables(folder: Path) -> list[KeptTable]:
    """Return the tables of a folder, in the order of their files' names.

    Raises
    ------
    FileNotFoundError
        If it holds none.
    """
    found = [_read(file) for file in sorted(folder.glob("*.md")) if file.name != _NO_TABLE]
    tables = [table for table in found if table]
    if not tables:
        raise FileNotFoundError(f"{folder.absolute()} holds no table of a benchmark")
    return tables


def status_cells(tables: Sequence[KeptTable], lasting: bool) -> list[list[str]]:
    """Return a line a table, the head first.

    Parameters
    ----------
    tables : sequence of KeptTable
    lasting : bool
        Without how old the code is, which every change of the code changes.
    """
    cells = [["table", *([] if lasting else ["age"]), *_COLUMNS]]
    for table in tables:
        made, name = table.provenance, table.file.name
        first = [f"[{table.file.stem}]({name})"] if lasting else [name, made.age]
        command = f"`{table.command}`" if lasting else table.command
        cells.append([*first, made.trials, made.version, made.code, made.prior, command])
    return cells


def _read(file: Path) -> KeptTable | None:
    """Return what a file says of itself; None: it is no benchmark's table."""
    text = file.read_text(encoding="utf-8")
    head = re.match(r"# .+\n\n`(flowleak .+)`\n", text)
    if not head:
        return None
    return KeptTable(file, head[1], Provenance.read(text) or _UNSAID)

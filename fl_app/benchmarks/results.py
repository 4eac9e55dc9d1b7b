"""The results of a benchmark: rows, kept in a file, and the table that they make."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.processes import shares
from fl_app.benchmarks.provenance import Provenance
from fl_app.benchmarks.rows import (
    Row,
    in_words,
    keep_results,
    kept_results,
    machine,
    made_by,
    with_facts,
)
from fl_app.util.markdown import markdown_table, narrowed, sections_markdown

_IN_PROVENANCE = ("flowleak", "version", "code")  # what the last line need not say again


@dataclass
class Results(ABC):
    """A benchmark's rows, kept in a file.

    Attributes
    ----------
    name : str
        The benchmark's.
    cases : sequence of Case
        In the order of the table.
    facts : mapping
        What the results depend on beside the cases, and what makes them (`MADE_BY`); a
        file with other facts is not resumed, see `kept_results`.
    path : Path or None
        Where the rows are kept; None: nowhere.
    rows : list of dict
        Each with its ``seed`` and `row_key`.
    notes : list of str
        Lines below the table.
    """

    name: str
    cases: Sequence[Case]
    facts: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _sharing: Mapping[str, Any] = field(default_factory=dict, init=False)
    _machine: Mapping[str, Any] = field(default_factory=machine, init=False)

    row_key = "case"

    def __post_init__(self) -> None:
        if not self.path or not self.path.exists():
            return
        kept = kept_results(self.path, self.facts)
        self.rows, self.notes, self._machine = kept["rows"], kept.get("notes", []), kept["machine"]
        self._sharing = {k: v for k, v in kept["facts"].items() if k in shares(1)}

    def case_name(self, case: Case) -> str:
        """Return what the rows of a case hold as their `row_key`."""
        return case.name

    def of(self, case: Case) -> list[Row]:
        """Return the rows of a case."""
        name = self.case_name(case)
        return [row for row in self.rows if row[self.row_key] == name]

    def chosen(self, only: str = "") -> list[Case]:
        """Return the cases in whose name the regular expression `only` is found.

        Raises
        ------
        ValueError
            If there is no such case, or it is no regular expression.
        """
        try:
            found = [case for case in self.cases if re.search(only, self.case_name(case))]
        except re.error as error:
            raise ValueError(f"cases is {only!r}: no regular expression, {error}") from error
        if not found:
            raise ValueError(
                f"cases is {only!r}: no case of {self.name} has it in its name; a name is like "
                f"{self.case_name(self.cases[0])!r}"
            )
        return found

    def missing(self, only: str, seeds: Sequence[int]) -> list[tuple[Case, int]]:
        """Return the chosen cases and seeds that have no row yet, seed by seed."""
        done = {(row[self.row_key], row["seed"]) for row in self.rows}
        return [
            (case, seed)
            for seed in seeds
            for case in self.chosen(only)
            if (self.case_name(case), seed) not in done
        ]

    def add(self, rows: Iterable[Row], workers: int) -> None:
        """Keep rows that were made here, by one of so many processes."""
        self._sharing, self._machine = shares(workers), machine()
        self.rows += [with_facts(row, self.facts) for row in rows]
        self.save()

    @property
    def trials(self) -> int:
        """Trials of the case that has the most of them."""
        return max((len({row["seed"] for row in self.of(case)}) for case in self.cases), default=0)

    def save(self) -> None:
        """Write facts, machine, summary, rows and notes, whole or not at all."""
        if self.path:
            content = {
                "benchmark": self.name,
                "facts": self._all_facts(),
                "machine": self._machine,
                **self.summaries(),
                "rows": self.rows,
                "notes": self.notes,
            }
            keep_results(self.path, content)

    def note(self, notes: Sequence[str]) -> None:
        """Keep lines that stand below the table."""
        if notes != self.notes:
            self.notes = list(notes)
            self.save()

    def markdown(self, command: str, shows: str = "") -> str:
        """Return table and notes in Markdown, between what made them and what they depend on.

        Parameters
        ----------
        command : str
            That makes them.
        shows : str
            What the table shows, a sentence.
        """
        made = made_by(self.rows)
        prior, trials = in_words(self.rows, "prior"), str(self.trials)
        provenance = Provenance(made["version"], made["code"], prior, trials)
        lines = [provenance.line, "", *([shows, ""] if shows else [])]
        cells, main = self.cells(), self.main_cells()
        if len(main[0]) < len(cells[0]):
            said, main = narrowed(main)
            words = "; ".join(f"{name} {value}" for name, value in said)
            lines += [*([f"In every line: {words}.", ""] if words else []), *markdown_table(main)]
            lines += ["", "## All columns", ""]
        lines += markdown_table(cells)
        if self.notes:
            lines += ["", *self.notes]
        facts = {**self._machine, **self._all_facts()}
        said_below = {key: value for key, value in facts.items() if key not in _IN_PROVENANCE}
        return sections_markdown(self.name, command, lines, said_below)

    def whole_table(self, title: str) -> Table:
        """Return all columns for a screen, below a title, without Markdown's bold."""
        head, *lines = self.cells()
        table = Table(*head, title=f"{self.name}: {title}")
        for line in lines:
            table.add_row(*(cell.strip("*") for cell in line))
        return table

    def summaries(self) -> dict[str, Any]:
        """Return what is written beside the rows; nothing by default."""
        return {}

    @abstractmethod
    def cells(self) -> list[list[str]]:
        """Return the lines of the table, its head first."""

    def main_cells(self) -> list[list[str]]:
        """Return the columns of `cells` that a reader looks at first; all by default."""
        return self.cells()

    @abstractmethod
    def table(self) -> Table:
        """Return the table's main columns for a screen."""

    @abstractmethod
    def shortfalls(self) -> list[str]:
        """Return, in words, every figure that misses its threshold."""

    def _all_facts(self) -> dict[str, Any]:
        return {**self.facts, **self._sharing, **made_by(self.rows)}

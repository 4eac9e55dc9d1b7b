"""Benchmarks that read something off clients' updates, without an attack."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.processes import in_processes
from fl_app.benchmarks.table import machine, results_markdown
from fl_app.data import ImageSet
from fl_app.protocol import DatasetInfo, Knowledge, Observation
from fl_app.util.files import write_text

Row = dict[str, Any]
Measure = Callable[[Observation, Knowledge, Truth], list[Row]]


def _no_bars(rows: Sequence[Row]) -> list[str]:
    return []


@dataclass(frozen=True)
class ClientBench:
    """A benchmark of freshly drawn clients: `flowleak bench NAME`.

    Attributes
    ----------
    name : str
    title : str
        What the table shows.
    clients : tuple of Case
        Their attacks are not run.
    measure : callable
        Returns the rows of one client's observation, knowledge and truth. At a module's
        top level, as worker processes import it.
    cells : callable
        Returns the lines of the table of rows, its head first.
    shortfalls : callable
        Returns, in words, every figure of rows that is below its bar.
    """

    name: str
    title: str
    clients: tuple[Case, ...]
    measure: Measure
    cells: Callable[[Sequence[Row]], list[list[str]]]
    shortfalls: Callable[[Sequence[Row]], list[str]] = _no_bars

    def run(
        self,
        images: ImageSet,
        train_images: ImageSet | None,
        info: DatasetInfo,
        draws: int,
        seed: int,
        console: Console,
        workers: int = 1,
    ) -> list[Row]:
        """Return the rows of all draws, each with its ``client`` and ``seed``.

        Parameters
        ----------
        images : ImageSet
            To draw a client's images from.
        train_images : ImageSet or None
            What earlier rounds train on; None where no client has any.
        info : DatasetInfo
        draws : int
            Clients of each kind.
        seed : int
            Of the first draw; see `draw_client`.
        console : Console
            Shows the progress.
        workers : int
            See `in_processes`.
        """
        calls = [(case, number) for number in range(seed, seed + draws) for case in self.clients]
        shared = self.measure, images, info, train_images
        rows: list[Row] = []
        for found in in_processes(_measure, shared, calls, workers, self.name, console):
            rows += found
        return rows

    def table(self, rows: Sequence[Row]) -> Table:
        """Return the table of rows for a terminal."""
        head, *lines = self.cells(rows)
        table = Table(*head, title=f"{self.name}: {self.title}")
        for line in lines:
            table.add_row(*line)
        return table

    def save(self, path: Path, rows: Sequence[Row], command: str, facts: Mapping[str, Any]) -> None:
        """Write the rows as JSON and the table beside them as Markdown, each whole or not at all.

        Parameters
        ----------
        path : Path
            Of the JSON file.
        rows : sequence of dict
        command : str
            The command that makes them.
        facts : mapping
            What the results depend on.
        """
        content = {"benchmark": self.name, "facts": dict(facts), "machine": machine(), "rows": rows}
        write_text(path, json.dumps(content, indent=1) + "\n")
        markdown = results_markdown(self.name, command, self.cells(rows), facts)
        write_text(path.with_suffix(".md"), markdown)


def _measure(
    shared: tuple[Measure, ImageSet, DatasetInfo, ImageSet | None], case: Case, seed: int
) -> list[Row]:
    """Return the rows of one client and draw, measured in a worker process."""
    measure, images, info, train_images = shared
    drawn = draw_client(case, images, info, seed, train_images)
    return [{"client": case.client, "seed": seed, **row} for row in measure(*drawn)]

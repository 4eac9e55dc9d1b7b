"""The benchmark `flowleak bench labels`: how many of a client's labels its update tells."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_app.audit.metrics import label_accuracy, label_chance, mean_interval
from fl_app.bench import Case, draw_client, machine, results_markdown
from fl_app.bench_processes import in_processes
from fl_app.config import AttackConfig
from fl_app.data import ImageSet
from fl_app.files import write_text
from fl_app.protocol import DatasetInfo, LocalTraining
from server_strategies.attacks.labels import choose_method, count_labels

METHODS = ("llg", "dlf", "simulate")  # and auto, which is one of them or idlg
CLIENTS = tuple(
    Case(replace(optimizer, local_steps=steps, batch_size=size), AttackConfig())
    for optimizer in (LocalTraining("sgd", lr=0.01), LocalTraining("adam", lr=1e-3))
    for steps, size in ((5, 1), (5, 8), (1, 1), (1, 8), (1, 32))
)
# Share of labels that `auto` has to count, by client.
BARS = {"sgd 0.01 K=5 B=8": 0.95, "adam 0.001 K=5 B=8": 0.85}

_COLUMNS = ("client", "method", "draws", "labels right", "bar", "chance", "s")


def run_label_bench(
    images: ImageSet, info: DatasetInfo, draws: int, seed: int, console: Console, workers: int = 1
) -> list[dict[str, Any]]:
    """Count the labels of freshly drawn clients by every method.

    Parameters
    ----------
    images : ImageSet
        To draw a client's images from.
    info : DatasetInfo
    draws : int
        Clients of each kind.
    seed : int
        Of the first draw; see `draw_client`.
    console : Console
        Shows the progress.
    workers : int
        See `in_processes`.

    Returns
    -------
    list of dict
        One row a client, draw and method: accuracy and chance in [0, 1],
        seconds, the method used and, for `auto`, why.
    """
    calls = [(case, number) for number in range(seed, seed + draws) for case in CLIENTS]
    rows: list[dict[str, Any]] = []
    for found in in_processes(_count, (images, info), calls, workers, "labels", console):
        rows += found
    return rows


def _count(data: tuple[ImageSet, DatasetInfo], case: Case, seed: int) -> list[dict[str, Any]]:
    """Return the rows of one client and draw, counted in a worker process."""
    images, info = data
    observation, knowledge, truth = draw_client(case, images, info, seed)
    chosen, reason = choose_method(case.training, observation.num_examples)
    measured = {}
    for method in dict.fromkeys((*METHODS, chosen)):
        began = time.monotonic()
        found = count_labels(method, observation, replace(knowledge, labels=None))
        measured[method] = {
            "accuracy": label_accuracy(found.counts, truth.labels),
            "chance": label_chance(truth.labels, info.num_classes),
            "seconds": time.monotonic() - began,
        }
    draw = {"client": case.client, "seed": seed}
    rows = [{**draw, "method": m, "used": m, **measured[m]} for m in METHODS]
    rows.append({**draw, "method": "auto", "used": chosen, **measured[chosen], "reason": reason})
    return rows


def label_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table, its head first: means over draws, 95% intervals."""
    lines = [list(_COLUMNS)]
    for case in CLIENTS:
        for method in (*METHODS, "auto"):
            kept = _of(rows, case.client, method)
            mean, low, _ = mean_interval([row["accuracy"] for row in kept])
            bar = BARS.get(case.client) if method == "auto" else None
            lines.append(
                [
                    case.client,
                    method,
                    str(len(kept)),
                    f"{mean:.1%}" + ("" if low is None else f" ± {100 * (mean - low):.1f}"),
                    "" if bar is None else f"{bar:.0%}",
                    f"{mean_interval([row['chance'] for row in kept])[0]:.1%}",
                    f"{mean_interval([row['seconds'] for row in kept])[0]:.2f}",
                ]
            )
    return lines


def label_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the benchmark's table for a terminal."""
    head, *lines = label_cells(rows)
    table = Table(*head, title="labels: share of images whose label was counted, 95% interval")
    for line in lines:
        table.add_row(*line)
    return table


def save_label_bench(
    path: Path, rows: Sequence[dict[str, Any]], command: str, facts: Mapping[str, Any]
) -> None:
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
    content = {"benchmark": "labels", "facts": dict(facts), "machine": machine(), "rows": rows}
    write_text(path, json.dumps(content, indent=1) + "\n")
    markdown = results_markdown("labels", command, label_cells(rows), facts)
    write_text(path.with_suffix(".md"), markdown)


def label_shortfalls(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return, in words, every client whose labels `auto` counts below the bar."""
    short = []
    for client, bar in BARS.items():
        mean = mean_interval([row["accuracy"] for row in _of(rows, client, "auto")])[0]
        if mean < bar:
            short.append(f"{client}: {mean:.1%} of labels, the bar is {bar:.0%}")
    return short


def _of(rows: Sequence[dict[str, Any]], client: str, method: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["client"] == client and row["method"] == method]

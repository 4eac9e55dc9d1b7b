"""The benchmark `flowleak bench labels`: how many of a client's labels its update tells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fl_app.audit.metrics import label_accuracy, label_chance, mean_interval, with_interval
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.reading import ClientBench, Row
from fl_app.config import AttackConfig
from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.labels import choose_method, infer_labels

METHODS = ("llg", "dlf", "simulate")  # and auto, which is one of them or idlg
# Share of labels that `auto` has to count, by client.
BARS = {"sgd 0.01 K=5 B=8": 0.95, "adam 0.001 K=5 B=8": 0.85}

_COLUMNS = ("client", "method", "draws", "labels right", "bar", "chance", "s")


def infer_by_every_method(
    observation: Observation, knowledge: Knowledge, truth: Truth
) -> list[Row]:
    """Return one row a method: accuracy and chance in [0, 1], seconds and the method used.

    That of `auto` has the reason of its choice, too.
    """
    chosen, reason = choose_method(knowledge.client, observation.num_examples)
    measured = {}
    for method in dict.fromkeys((*METHODS, chosen)):
        began = time.monotonic()
        found = infer_labels(method, observation, replace(knowledge, labels=None))
        measured[method] = {
            "accuracy": label_accuracy(found.counts, truth.labels),
            "chance": label_chance(truth.labels, knowledge.num_classes),
            "seconds": time.monotonic() - began,
        }
    rows: list[Row] = [{"method": m, "used": m, **measured[m]} for m in METHODS]
    rows.append({"method": "auto", "used": chosen, **measured[chosen], "reason": reason})
    return rows


def label_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines of the table, its head first: means over draws, 95% intervals."""
    lines = [list(_COLUMNS)]
    for client in dict.fromkeys(row["client"] for row in rows):
        for method in (*METHODS, "auto"):
            kept = _of(rows, client, method)
            bar = BARS.get(client) if method == "auto" else None
            lines.append(
                [
                    client,
                    method,
                    str(len(kept)),
                    with_interval([100 * row["accuracy"] for row in kept], 1) + "%",
                    "" if bar is None else f"{bar:.0%}",
                    f"{mean_interval([row['chance'] for row in kept])[0]:.1%}",
                    f"{mean_interval([row['seconds'] for row in kept])[0]:.2f}",
                ]
            )
    return lines


def label_shortfalls(rows: Sequence[Row]) -> list[str]:
    """Return, in words, every client whose labels `auto` counts below the bar."""
    short = []
    for client, bar in BARS.items():
        mean = mean_interval([row["accuracy"] for row in _of(rows, client, "auto")])[0]
        if mean < bar:
            short.append(f"{client}: {mean:.1%} of labels, the bar is {bar:.0%}")
    return short


def _of(rows: Sequence[Row], client: str, method: str) -> list[Row]:
    return [row for row in rows if row["client"] == client and row["method"] == method]


LABELS = ClientBench(
    "labels",
    "share of images whose label was counted, 95% interval",
    tuple(
        Case(replace(optimizer, local_steps=steps, batch_size=size), AttackConfig())
        for optimizer in (LocalTraining("sgd", lr=0.01), LocalTraining("adam", lr=1e-3))
        for steps, size in ((5, 1), (5, 8), (1, 1), (1, 8), (1, 32))
    ),
    infer_by_every_method,
    label_cells,
    label_shortfalls,
)

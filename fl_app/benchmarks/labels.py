"""The benchmark `flowleak bench labels`: how many of a client's labels are inferred."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fl_app.audit.metrics import label_accuracy, label_chance
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD
from fl_app.benchmarks.rows import Row
from fl_app.benchmarks.suite import ReadingSuite
from fl_app.config import AttackConfig
from fl_app.protocol import Knowledge, Observation
from fl_app.util.intervals import PERCENT, mean_interval, with_interval
from server_strategies.attacks.labels import choose_method, infer_labels

METHODS = ("llg", "dlf", "simulate")  # and auto, which is one of them or idlg
THRESHOLDS = {"sgd 0.01 K=5 B=8": 0.95, "adam 0.001 K=5 B=8": 0.85}
"""Share of labels that `auto` has to infer, by client."""

_COLUMNS = ("client", "method", "trials", "labels right", "threshold", "chance", "s")


class _Labels(ReadingSuite):
    def read(self, observation: Observation, knowledge: Knowledge, truth: Truth) -> list[Row]:
        """Return one row a method: accuracy and chance in [0, 1], seconds and the method used.

        That of `auto` has the reason of its choice, too.
        """
        chosen, reason = choose_method(knowledge.client, observation.num_examples)
        measured = {}
        for method in dict.fromkeys((*METHODS, chosen)):
            began = time.monotonic()
            found = infer_labels(method, observation, knowledge.granting("unknown"))
            measured[method] = {
                "accuracy": label_accuracy(found.counts, truth.labels),
                "chance": label_chance(truth.labels, knowledge.num_classes),
                "seconds": time.monotonic() - began,
            }
        rows: list[Row] = [{"method": m, "used": m, **measured[m]} for m in METHODS]
        rows.append({"method": "auto", "used": chosen, **measured[chosen], "reason": reason})
        return rows

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """Return a line a client and method: means over trials, 95% intervals."""
        lines = [list(_COLUMNS)]
        for client in dict.fromkeys(row["client"] for row in rows):
            for method in (*METHODS, "auto"):
                kept = _of(rows, client, method)
                threshold = THRESHOLDS.get(client) if method == "auto" else None
                lines.append(
                    [
                        client,
                        method,
                        str(len(kept)),
                        with_interval([100 * row["accuracy"] for row in kept], 1, PERCENT) + "%",
                        "" if threshold is None else f"{threshold:.0%}",
                        f"{_mean(kept, 'chance'):.1%}",
                        f"{_mean(kept, 'seconds'):.2f}",
                    ]
                )
        return lines

    def shortfalls(self, rows: Sequence[Row]) -> list[str]:
        """Return, in words, every client of whose labels `auto` infers too few."""
        kept = {client: _of(rows, client, "auto") for client in THRESHOLDS}
        reached = {client: _mean(each, "accuracy") for client, each in kept.items() if each}
        return [
            f"{client}: {mean:.1%} of labels, the threshold is {THRESHOLDS[client]:.0%}"
            for client, mean in reached.items()
            if mean < THRESHOLDS[client]
        ]


def _of(rows: Sequence[Row], client: str, method: str) -> list[Row]:
    return [row for row in rows if row["client"] == client and row["method"] == method]


def _mean(rows: Sequence[Row], key: str) -> float:
    return mean_interval([row[key] for row in rows])[0]


SUITE = _Labels(
    tuple(
        Case(replace(client, local_steps=steps, batch_size=size), AttackConfig())
        for client in (SGD, ADAM)
        for steps, size in ((5, 1), (5, 8), (1, 1), (1, 8), (1, 32))
    ),
    "share of images whose label was inferred, 95% interval",
)
"""How many of a client's labels are inferred from its update, by every method.

No attack is run.
"""

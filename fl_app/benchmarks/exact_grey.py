"""The benchmark `flowleak bench exact-grey`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import SGD, timed
from fl_app.benchmarks.suite import AttackSuite

STATES = ("init", "epoch-3")


def _cases() -> tuple[Case, ...]:
    client = replace(SGD, batch_size=8)
    return tuple(
        Case(
            client,
            timed(120, "flow_matching"),
            model=model,
            labels="unknown",
            state=state,
            recognised=1.0,
        )
        for model in ("mlp", "lenet5")
        for state in STATES
    )


SUITE = AttackSuite(_cases())
"""What exact features give away of grey images of 28x28, labels and their order unknown.

Take `--dataset mnist` or `fashion_mnist`, or a folder of parquet files that is named so: images
in class folders are read as colour.
"""

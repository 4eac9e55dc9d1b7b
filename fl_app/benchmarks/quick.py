"""The benchmark `flowleak bench quick`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, PAIR, flow
from fl_app.benchmarks.suite import AttackSuite
from fl_app.config import AttackConfig


def _cases() -> tuple[Case, ...]:
    sgd, adam = PAIR
    return (
        Case(replace(ADAM, batch_size=1), flow(200), threshold=21.5),
        Case(adam, flow(200), threshold=21.0),
        Case(sgd, flow(200), threshold=22.0),
        Case(sgd, flow(200, matching="surrogate")),
        Case(sgd, AttackConfig("sme", 300, options={"tv": 0.03}), threshold=21.0),
    )


SUITE = AttackSuite(_cases())
"""Clients with Adam and with SGD, and what matching by a surrogate loses.

With 8 trials, about half an hour of one thread.
"""

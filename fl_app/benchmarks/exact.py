"""The benchmark `flowleak bench exact`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, timed
from fl_app.benchmarks.suite import AttackSuite
from fl_app.protocol import Defense

STATES = ("init", "epoch-10", "epoch-20")
"""At about 10, 60 and 67% accuracy on CIFAR-10."""

_OPEN: dict[str, Any] = {"threshold": None, "recognised": None}
_DEFENSES = (
    Defense(noise="gaussian", sigma=1.0, relative=True),
    Defense(quantize="bf16"),
    Defense(quantize="int8"),
)
"""Under which the terms of an update are mostly lost, so that other objectives are left."""


def _cases() -> tuple[Case, ...]:
    init, sixty, most = STATES
    one, two, four = (replace(SGD, batch_size=size) for size in (1, 2, 4))
    adam, adam_four = (replace(ADAM, batch_size=size) for size in (1, 4))
    rows = (
        (one, init, 60, 36.0, 0.95),
        (one, sixty, 60, 30.0, 0.95),
        (one, most, 60, 28.0, 0.95),
        (two, init, 90, 34.0, None),
        (two, sixty, 90, 28.0, None),
        (four, init, 120, 33.0, None),
        (four, sixty, 120, 18.0, 0.4),
        (replace(one, momentum=0.9), sixty, 60, 29.0, None),
        (replace(one, local_steps=20), sixty, 150, 24.0, None),
        (adam, init, 60, 29.0, None),
        (adam, sixty, 60, 26.0, None),
        (adam, most, 60, 24.0, None),
        (adam_four, sixty, 180, 16.0, 0.3),
    )
    cases = [
        Case(
            client,
            timed(seconds, "flow_matching"),
            psnr,
            labels="unknown",
            state=state,
            recognised=share,
        )
        for client, state, seconds, psnr, share in rows
    ]
    first = cases[0]
    passes = replace(one, local_steps=10)
    for state in (init, sixty):
        cases.append(replace(first, training=passes, num_examples=5, state=state, **_OPEN))
    cases += [replace(first, defense=defense, **_OPEN) for defense in _DEFENSES]
    return tuple(cases)


SUITE = AttackSuite(_cases())
"""What exact features give away, untrained and trained, labels and their order unknown.

With 8 trials, about 3 hours of one thread.
"""

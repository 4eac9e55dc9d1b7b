"""The benchmark `flowleak bench batch-sizes`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, flow
from fl_app.benchmarks.suite import AttackSuite

SUITE = AttackSuite(
    tuple(
        Case(replace(client, local_steps=steps, batch_size=size), flow(300))
        for client in (SGD, ADAM)
        for steps in (1, 5)
        for size in (1, 2, 4, 8, 16, 32)
    )
)
"""Batches of 1 to 32 images: Figure 3 of the paper, for one local step and for five.

With 8 trials, about 7 hours of one thread, half of them at B=32; `--cases B=4` runs a part.
"""

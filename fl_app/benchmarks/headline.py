"""The benchmark `flowleak bench headline`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, timed
from fl_app.benchmarks.suite import AttackSuite

STATES = ("init", "epoch-3", "epoch-10")
_CLIENTS = ((5, 1, 30), (5, 4, 90), (5, 8, 90), (4, 16, 120))
"""Local steps, images a step, and seconds of one thread for the attack."""


SUITE = AttackSuite(
    tuple(
        Case(
            replace(client, local_steps=steps, batch_size=size),
            timed(seconds, "flow_matching"),
            state=state,
        )
        for client in (SGD, ADAM)
        for steps, size, seconds in _CLIENTS
        for state in STATES
    )
)
"""The defaults on clients with SGD and with Adam, over batch sizes and the training of the model.

The last client of each trains one epoch on 64 images in batches of 16. A trial takes one thread
about half an hour.
"""

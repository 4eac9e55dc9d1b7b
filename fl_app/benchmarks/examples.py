"""The benchmark `flowleak bench examples`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, timed
from fl_app.benchmarks.suite import AttackSuite

COUNTS = (16, 32, 64, 128, 320, 1600)
_BATCH = 32
_SECONDS = 300  # of one thread, for each attack


SUITE = AttackSuite(
    tuple(
        Case(
            replace(client, local_steps=max(1, count // _BATCH), batch_size=min(count, _BATCH)),
            timed(_SECONDS, "flow_matching"),
            labels="unknown",
        )
        for client in (SGD, ADAM)
        for count in COUNTS
    )
)
"""How many images are recognised against how many a client holds: one epoch in batches of 32.

A trial takes one thread about an hour; ``--cases 'K=[124] '`` runs a part, up to 128 images.
"""

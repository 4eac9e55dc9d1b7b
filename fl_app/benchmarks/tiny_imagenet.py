"""The benchmark `flowleak bench tiny-imagenet`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, Options, flow
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    clients = ((replace(SGD, batch_size=1), 5.0), (replace(ADAM, batch_size=1), None))
    tried: tuple[Options, ...] = ({}, {"tiles": True}, {"flow": 0})
    return tuple(
        Case(client, flow(500, **options), state="epoch-3", above_mean_colour=above)
        for client, above in clients
        for options in tried
    )


SUITE = AttackSuite(_cases())
"""Images of 64x64 pixels, seen by the prior whole or in tiles, or not at all.

Take `--dataset tiny_imagenet`, or a folder of it.
"""

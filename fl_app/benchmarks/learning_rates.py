"""The benchmark `flowleak bench learning-rates`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, Options, flow
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    sgd, adam = PAIR
    one = Case(replace(sgd, batch_size=1), flow(200), state="epoch-3")
    tried: tuple[tuple[Case, tuple[Options, ...]], ...] = (
        (Case(sgd, flow(200)), ({"lr": 2.0}, {"lr": 4.0})),
        (one, ({"lr": 2.0}, {"lr": 4.0})),
        (replace(one, model="mlp_mixer"), ({"lr": 2.0}, {"lr": 4.0})),
        (Case(adam, flow(200)), ({"lr": 0.4}, {"lr": 2.0})),
    )
    return tuple(
        replace(case, attack=flow(200, **options))
        for case, others in tried
        for options in ({}, *others)
    )


SUITE = AttackSuite(_cases(), split="tuning")
"""The learning rate of flow_matching's search, the default first.

With 4 trials, 70 minutes of one thread, half of them the MLP-Mixer's.
"""

"""The benchmark `flowleak bench prior-strength`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, SGD, Options, flow
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    """Return SGD's clients by the strength at first, Adam's by that at the end.

    SGD K=5, B=4 with the flow prior and with total variation alone, then other clients; Adam
    with both, as `prior` runs them.
    """
    batch = Case(PAIR[0], flow(200))
    one = replace(batch, training=replace(SGD, batch_size=1), state="epoch-3")
    tried: list[tuple[Case, Options]] = [
        (batch, {}),
        (batch, {"flow": 0}),
        (replace(batch, training=replace(SGD, local_steps=1, batch_size=16)), {}),
        (one, {}),
        (replace(one, model="mlp_mixer"), {}),
    ]
    of_sgd = (
        replace(case, attack=flow(200, prior_strength=first, final_prior_strength=0.05, **options))
        for case, options in tried
        for first in (0.1, 0.4, 1.5)
    )
    of_adam = (
        Case(PAIR[1], flow(500, prior_strength=1.5, final_prior_strength=last, **options))
        for options in ({}, {"flow": 0})
        for last in (0.2, 0.45, 0.7)
    )
    return (*of_sgd, *of_adam)


SUITE = AttackSuite(_cases(), split="tuning")
"""How strong priors should be beside the matching loss: what `PRIOR_STRENGTH` rests on.

With 4 trials, 80 minutes of one thread.
"""

"""The benchmark `flowleak bench tv-weights`."""

from __future__ import annotations

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, Options, flow
from fl_app.benchmarks.suite import AttackSuite

# Where total variation is the only prior and its strength is set, its weight does not matter.
_ALONE: tuple[Options, ...] = (
    {"flow": 0, "prior_strength": 0, "tv": 0.01},
    {"flow": 0, "prior_strength": 0, "tv": 0.03},
    {"flow": 0, "prior_strength": 0, "tv": 0.1},
    {"flow": 0, "prior_strength": 0, "tv": 0.3},
    {"flow": 0, "prior_strength": 0.4, "final_prior_strength": 0.1},
    {"flow": 0, "prior_strength": 0.1, "final_prior_strength": 0.05},
    {"flow": 0, "prior_strength": 1.5, "final_prior_strength": 0.2},
)
_BESIDE_FLOW: tuple[Options, ...] = ({"tv": 0.01}, {"tv": 0.03}, {"tv": 0.1})

SUITE = AttackSuite(
    tuple(
        Case(client, flow(200, **options)) for client in PAIR for options in _ALONE + _BESIDE_FLOW
    ),
    split="tuning",
)
"""The weights of total variation, with and without the flow: the grids behind `prior`.

On images that `prior` does not use. With 4 trials, about 70 minutes of one thread.
"""

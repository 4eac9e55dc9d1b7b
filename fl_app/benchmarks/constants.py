"""The benchmark `flowleak bench constants`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, PAIR, SGD, Options, flow, timed
from fl_app.benchmarks.family import IN_SHORT
from fl_app.benchmarks.suite import AttackSuite

STATES = ("init", "epoch-3")
_ITERATIONS = 200


def _one_change() -> list[Case]:
    """Return flow_matching's defaults and one change to them, untrained and trained.

    SGD's steps are simulated, as where exact features don't reach; Adam's client is attacked by
    what its update holds.
    """
    of_both: list[Options] = [
        {"lr": 0.4},
        {"lr": 2.0},
        {"flow": 0},
        {"tv": 0.1},
        {"every": 4},
        {"draws": 2},
        {"polish": 0.25},
        {"t_start": 0.95},
        {"prior_strength": 0.4, "final_prior_strength": 0.1},
    ]
    of_sgd: list[Options] = [
        {"distance": "cosine"},
        {"relu_smoothing": 0},
        {"relu_smoothing": 4},
        {"distance": "cosine", "relu_smoothing": 0},
        {"prior_strength": 1.5, "final_prior_strength": 0.45},
    ]
    of_adam: list[Options] = [
        {"relu_smoothing": 16},
        {"prior_strength": 0.1, "final_prior_strength": 0.05},
    ]
    simulated: Options = {"matching": "trajectory"}
    return [
        Case(replace(client, batch_size=1), flow(_ITERATIONS, **{**base, **change}), state=state)
        for state in STATES
        for client, base, changes in ((SGD, simulated, of_sgd), (ADAM, {}, of_adam))
        for change in ({}, *changes, *of_both)
    ]


def _of_family() -> list[Case]:
    """Return the authors' constants, one change to them, and those of `family`; GGL's searches."""
    tried: dict[str, list[Options]] = {
        "flow_matching": [{}],
        "sme": [{}, {"tv": 0.1}],
        "inverting_gradients": [{}, {"matching": "auto"}],
        "dlf": [{}, {"lr": 0.15}],
        "gradinversion": [{}, {"matching": "auto"}],
    }
    cases = [
        Case(PAIR[0], timed(50, name, **options))
        for name, others in tried.items()
        for options in (*others, IN_SHORT[name])
    ]
    single = replace(SGD, local_steps=1, batch_size=1)
    return [*cases, *(Case(single, timed(50, "ggl", **each)) for each in ({}, {"search": "cma"}))]


def _turns() -> list[Case]:
    """Return how often `flow_matching` runs its denoiser.

    Where steps are simulated, where rows are matched, and where exact features are.
    """
    simulated = (
        Case(PAIR[0], flow(_ITERATIONS, matching="trajectory", every=every)) for every in (1, 2, 4)
    )
    one = replace(ADAM, batch_size=1)
    read = (
        Case(client, timed(seconds, "flow_matching", every=every), state=state)
        for client, seconds, state in (
            (one, 12, "init"),
            (PAIR[1], 50, "init"),
            (one, 20, "epoch-3"),
        )
        for every in (1, 4)
    )
    return [*simulated, *read]


SUITE = AttackSuite((*_one_change(), *_of_family(), *_turns()), split="tuning")
"""What the attacks' constants rest on: one change at a time, untrained and trained alike.

On images that no other benchmark draws. A trial takes one thread about 40 minutes; `--cases x200`
runs flow_matching's, `--cases '50 s'` those of `family`.
"""

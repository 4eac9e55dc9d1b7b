"""The benchmark `flowleak bench ablation`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, Options, flow
from fl_app.benchmarks.suite import AttackSuite
from server_strategies.attacks.flow_matching import PRIOR_STRENGTH


def _cases() -> tuple[Case, ...]:
    """Return one change at a time to the defaults, which come first.

    14 cases of each client at B=1, 5 at B=4, and with and without the flow at B=8.
    """
    # As eq. 17 and 18 have it: absolute weights, here at a constant flow time.
    literal: Options = {"mode": "velocity", "prior_strength": 0, "t_start": 0.95, "t_end": 0.95}
    of_eight: list[Options] = [{}, {"flow": 0}]
    of_four = [*of_eight, {"every": 4}, {**literal, "flow": 0.01}, {"polish": 0.25}]
    of_one = [
        *of_four,
        {**literal, "flow": 0.001},
        {"every": 2},
        {"tv": 0},
        {"prior_strength": 0.4, "final_prior_strength": 0.1},
        {"draws": 2},
        {"t_start": 0.8, "t_end": 0.8},
        {"t_start": 0.95, "t_end": 0.95},
    ]
    cases = []
    for size, iterations, tried in ((1, 100, of_one), (4, 100, of_four), (8, 200, of_eight)):
        # An absolute weight has to fit the client's loss; chosen on one trial of each.
        # Each client also gets the prior strength that is the other's default.
        for client, weight, (first, last) in (
            (SGD, 0.3, PRIOR_STRENGTH["adam"]),
            (ADAM, 1.0, PRIOR_STRENGTH["sgd"]),
        ):
            absolute: Options = {"prior_strength": 0, "flow": weight}
            swapped: Options = {"prior_strength": first, "final_prior_strength": last}
            also = [absolute, swapped] if size == 1 else []
            cases += [
                Case(replace(client, batch_size=size), flow(iterations, **options))
                for options in (*tried, *also)
            ]
    return tuple(cases)


SUITE = AttackSuite(_cases())
"""How the flow prior is best used: one change at a time to the defaults.

With 16 trials, 4 hours of one thread; `--cases B=4,` runs a part.
"""

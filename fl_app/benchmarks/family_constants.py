"""The benchmark `flowleak bench family-constants`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, PAIR, SGD, Options, timed
from fl_app.benchmarks.family import IN_SHORT
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    """Return the authors' constants, one change to them and those of `family`; GGL's searches.

    Then how often `flow_matching` runs its denoiser under Adam: beside rows that are matched, and
    beside exact features of a trained model.
    """
    tried: dict[str, list[Options]] = {
        "flow_matching": [{}],
        "sme": [{}, {"tv": 0.1}],
        "inverting_gradients": [{}, {"matching": "auto"}],
        "dlf": [{}, {"lr": 0.15}],
        "gradinversion": [{}, {"matching": "auto"}],
    }
    single = replace(SGD, local_steps=1, batch_size=1)
    return (
        *(
            Case(PAIR[0], timed(50, name, **options))
            for name, others in tried.items()
            for options in (*others, IN_SHORT[name])
        ),
        Case(single, timed(50, "ggl")),
        Case(single, timed(50, "ggl", search="cma")),
        *(
            Case(client, timed(seconds, "flow_matching", every=every), state=state)
            for client, seconds, state in (
                (replace(ADAM, batch_size=1), 12, "init"),
                (PAIR[1], 50, "init"),
                (replace(ADAM, batch_size=1), 20, "epoch-3"),
            )
            for every in (1, 4)
        ),
    )


SUITE = AttackSuite(_cases(), split="tuning")
"""The authors' constants beside those of `family`, GGL's two searches, the denoiser's turns.

On images that `family` does not use. With 2 trials, about 35 minutes of one thread.
"""

"""The benchmark `flowleak bench family-constants`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, SGD, Options, timed
from fl_app.benchmarks.family import IN_SHORT
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    """Return the authors' constants, one change to them and those of `family`; GGL's searches."""
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
    )


SUITE = AttackSuite(_cases(), split="tuning")
"""The authors' constants beside those of `family`, and GGL's two searches.

On images that `family` does not use. With 2 trials, about 27 minutes of one thread.
"""

"""The benchmark `flowleak bench states`: the paper's Figure 4."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, timed
from fl_app.benchmarks.family import IN_SHORT
from fl_app.benchmarks.rows import file_beside
from fl_app.benchmarks.suite import AttackSuite, Setting

STATES = ("init", "epoch-1", "epoch-3", "epoch-6", "epoch-10", "converged")
ATTACKS = ("flow_matching", "sme", "dlf", "gradinversion", "ggl")
_SECONDS = 20  # of one thread, for each attack


class _States(AttackSuite):
    def notes(self, results: AttackResults, setting: Setting, console: Console) -> list[str]:
        """Draw the curves where results are kept."""
        # Slow to import, and only a plot needs it.
        from fl_app.benchmarks.state_plot import save_state_plot

        if setting.path:
            save_state_plot(file_beside(setting.path, ".png"), results)
        return []


SUITE = _States(
    tuple(
        Case(
            replace(client, batch_size=1),
            timed(_SECONDS, name, **IN_SHORT.get(name, {})),
            state=state,
        )
        for client in (SGD, ADAM)
        for state in STATES
        for name in ATTACKS
    )
)
"""Leakage and accuracy over the training of the global model, by attack: the paper's Figure 4.

With 4 trials, about 1.5 hours of one thread, and one more to train the states once.
"""

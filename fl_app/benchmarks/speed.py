"""The benchmark `flowleak bench speed`."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, timed
from fl_app.benchmarks.suite import AttackSuite, Setting

_SECONDS = {1: (5, 12, 30, 60), 4: (15, 30, 60), 8: (60,)}  # by images a step
_FIRST = {1: 12, 4: 30, 8: 60}  # budget from which the threshold holds
_GAIN = 3.0  # dB
_OTHERS = ("inverting_gradients", "dlf", "gradinversion", "ggl")


def _cases() -> tuple[Case, ...]:
    """Return SME and flow_matching by budget under SGD, then flow_matching under Adam.

    Then every other attack of several steps by budget, with one image a step.
    """
    cases = []
    for batch, budgets in _SECONDS.items():
        client = replace(SGD, batch_size=batch)
        for seconds in budgets:
            gain = _GAIN if seconds >= _FIRST[batch] else None
            cases += [
                Case(client, timed(seconds, "sme")),
                Case(client, timed(seconds, "flow_matching"), gain=gain),
            ]
    one, four = (replace(ADAM, batch_size=batch) for batch in (1, 4))
    cases += [Case(one, timed(12, "flow_matching"))]
    cases += [
        Case(four, timed(seconds, "flow_matching"), threshold=26.0 if seconds == 40 else None)
        for seconds in (20, 40)
    ]
    cases += [
        Case(replace(client, batch_size=1), timed(30, "flow_matching"), state="epoch-3")
        for client in (SGD, ADAM)
    ]
    cases += [
        Case(replace(client, batch_size=1), timed(seconds, name))
        for client, names in ((SGD, _OTHERS), (ADAM, ("sme", *_OTHERS)))
        for seconds in (12, 30)
        for name in names
    ]
    cases += [Case(one, timed(30, "flow_matching"))]
    return tuple(cases)


class _Speed(AttackSuite):
    def notes(self, results: AttackResults, setting: Setting, console: Console) -> list[str]:
        """Say what an iteration costs; it is measured where trials are."""
        if not setting.trials:
            return results.notes
        # Slow to import, and only these lines need it.
        from fl_app.benchmarks.step_costs import step_costs

        clients = [replace(SGD, batch_size=size) for size in (1, 4, 8)]
        lines = [step_costs(setting.info, setting.images, client).line() for client in clients]
        return [
            *lines,
            "CPU seconds of one thread, taken in turn. Asked for B=4: 0.6 for the gradient, 55% of "
            "the core, 1.0 for the iteration.",
        ]


SUITE = _Speed(_cases())
"""What a few seconds bring: flow_matching beside the others, and what an iteration costs.

A trial takes one thread 20 minutes. Seconds are only equal on cores that nothing else uses.
"""

"""The benchmark `flowleak bench relu-smoothing`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import PAIR, Options, flow
from fl_app.benchmarks.suite import AttackSuite


def _cases() -> tuple[Case, ...]:
    """Return SGD without, at the prior strength that was best then, and every client by width."""
    sgd, adam = PAIR
    best: Options = {"relu_smoothing": 0, "prior_strength": 0.4, "final_prior_strength": 0.3}
    cases = [Case(sgd, flow(200, **best))]
    widths = {sgd: (0, 1, 8, 16, 32), adam: (0, 1), replace(adam, local_steps=1): (0, 16)}
    cases += [
        Case(client, flow(200, relu_smoothing=width))
        for client, tried in widths.items()
        for width in tried
    ]
    return tuple(cases)


SUITE = AttackSuite(_cases(), split="tuning")
"""Widths of ReLU's surrogate gradient, on the ConvNet: what `RELU_SMOOTHING` rests on.

With 2 trials, 20 minutes of one thread.
"""

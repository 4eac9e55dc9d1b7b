"""The benchmark `flowleak bench closed-form`."""

from __future__ import annotations

from dataclasses import replace

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import ADAM, SGD, flow
from fl_app.benchmarks.suite import AttackSuite

SUITE = AttackSuite(
    tuple(
        Case(replace(client, local_steps=1, batch_size=1), flow(50), model=model)
        for model in ("mlp", "vit_tiny")
        for client in (SGD, ADAM)
    )
)
"""One image and one step, of models that give it away in closed form.

With 8 trials, 6 minutes of one thread.
"""

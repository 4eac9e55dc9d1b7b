"""What several benchmarks share: their clients, and attacks in few words."""

from __future__ import annotations

from dataclasses import replace

from fl_app.config import UNBOUNDED, AttackConfig
from fl_app.protocol import LocalTraining

Options = dict[str, float | str]

ADAM = LocalTraining(optimizer="adam", lr=1e-3, local_steps=5)
SGD = LocalTraining(optimizer="sgd", lr=0.01, local_steps=5)
PAIR = (replace(SGD, batch_size=4), replace(ADAM, batch_size=4))


def flow(iterations: int, **options: float | str) -> AttackConfig:
    """Return flow_matching with some options, for so many iterations."""
    return AttackConfig("flow_matching", iterations, options=options)


def timed(seconds: float, name: str, **options: float | str) -> AttackConfig:
    """Return an attack with some options, for so many seconds of one thread."""
    return AttackConfig(name, UNBOUNDED, seconds, options)

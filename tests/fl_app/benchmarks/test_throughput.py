"""Attacks a minute, counted with a pool that works in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from fl_app.benchmarks import throughput as measuring
from fl_app.benchmarks.throughput import Throughput, throughput
from server_strategies.attack_pool import Job
from server_strategies.attacks.run import run_attack


class Here:
    """A pool without workers."""

    unfinished = 0

    def __init__(self, folder: Path, pool: Any, found: Callable[..., None], *_: Any) -> None:
        self.found = found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, job: Job) -> None:
        made = run_attack(job.observation, job.knowledge, job.attack, job.prior, job.seed)
        self.found(job, made, "cpu")


def test_attacks_after_each_workers_first_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "AttackPool", Here)
    (measured,) = throughput([1], 1, 1.0, tmp_path)
    assert measured.attacks == 1 and 0.5 < measured.share <= 1
    known = Throughput(workers=2, attacks=30, seconds=40.0, spent=60.0)
    assert known.a_minute == 45 and known.share == 0.75

"""Benchmarks in this process: another takes ten seconds to import what this one has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fl_app.benchmarks import processes


@contextmanager
def _pool_here(workers: int, threads: int, shared: object = None) -> Iterator[Executor]:
    processes._shared = shared
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the trials of a benchmark in this process, but where processes are what is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_processes":
        monkeypatch.setattr(processes, "process_pool", _pool_here)

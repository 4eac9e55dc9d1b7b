"""Benchmarks in this process: another takes ten seconds to import what this one has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import pytest

from fl_app.benchmarks import processes


class _Here(Executor):
    """Calls at once what is submitted."""

    def submit(  # type: ignore[override]
        self, function: Callable[..., Any], /, *arguments: Any
    ) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


@contextmanager
def _pool_here(workers: int, threads: int, shared: object = None) -> Iterator[Executor]:
    processes._shared = shared
    yield _Here()


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the trials of a benchmark in this process, but where processes are what is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_processes":
        monkeypatch.setattr(processes, "process_pool", _pool_here)

"""Benchmarks in this process."""

from __future__ import annotations

import pytest
from helpers.pools import pool_here

from fl_app.benchmarks import processes


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the trials of a benchmark in this process, but where processes are what is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_processes":
        monkeypatch.setattr(processes, "process_pool", pool_here)

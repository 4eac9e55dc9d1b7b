"""A pool of processes, pretended: another process takes ten seconds to import what this one has."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from fl_app.benchmarks import processes


@contextmanager
def pool_here(workers: int, threads: int, shared: object = None) -> Iterator[Executor]:
    """Do as `process_pool` in a thread of this process, one call after the other."""
    processes._shared = shared
    with ThreadPoolExecutor(1) as pool:
        yield pool

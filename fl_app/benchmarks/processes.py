"""Work shared out to processes: the pool under every benchmark."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import torch
from rich.console import Console

from fl_app.util.progress import progress_bar

_Result = TypeVar("_Result")
_shared: Any


def shares(workers: int) -> dict[str, int]:
    """Return how many processes share the work, and the threads of each: facts of a result.

    Together they have as many threads as this process, but at least one each.
    """
    return {"workers": workers, "threads": max(1, torch.get_num_threads() // workers)}


def in_processes(
    function: Callable[..., _Result],
    shared: object,
    calls: Sequence[tuple[Any, ...]],
    workers: int,
    name: str,
    console: Console,
) -> Iterator[_Result]:
    """Yield the results of ``function(shared, *call)`` as they are finished.

    Parameters
    ----------
    function : callable
        At a module's top level, as the processes import it.
    shared : object
        Sent to each process once.
    calls : sequence of tuple
    workers : int
        Processes, which share the cores: more calls an hour, each one slower.
    name : str
        What the progress bar says.
    console : Console
        Shows the progress.
    """
    threads = shares(workers)["threads"]
    with progress_bar(console) as bar, process_pool(workers, threads, shared) as pool:
        task = bar.add_task(name, total=len(calls))
        for finished in as_completed([pool.submit(_call, function, call) for call in calls]):
            yield finished.result()
            bar.advance(task)


@contextmanager
def process_pool(workers: int, threads: int, shared: object = None) -> Iterator[Executor]:
    """Yield a pool of processes, which start with their first call and end with this process.

    They do so also where it is killed. At the end of the context calls that have not begun are
    dropped.

    Parameters
    ----------
    workers : int
    threads : int
        Of each.
    shared : object
        Sent to each once, for `in_processes`.
    """
    # A worker that grew up in a process with threads of its own may hang: spawn.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _enter, (shared, threads))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _enter(shared: object, threads: int) -> None:
    """Prepare a worker process."""
    global _shared
    _shared = shared
    torch.set_num_threads(threads)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # The pool's queue keeps a worker waiting for ever if its parent is killed. The kernel's signal
    # (fl_app/util/processes.py) is Linux's, and comes when the thread that started a worker ends.
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., _Result], call: tuple[Any, ...]) -> _Result:
    return function(_shared, *call)

"""Processes that belong together: started in turn, restarted or ended with one another."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

_GRACE = 10.0  # seconds to end by itself, before a process is killed
_PAUSE = 2.0  # seconds before a process is started again


@dataclass(frozen=True)
class Child:
    """A process of a group.

    Attributes
    ----------
    name : str
    command : sequence of str
    environment : mapping of str to str
        Added to this process's own.
    when_it_ends : {"stop", "restart", "retry"}
        End all others too, start it again, or start it again unless it succeeded.
    end : signal.Signals
        What ends it, also when this process is killed (on Linux).
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    when_it_ends: str = "stop"
    end: signal.Signals = signal.SIGTERM


def run_together(
    children: Sequence[Child], tell: Callable[[str], None], ready: Callable[[], None] | None = None
) -> int:
    """Run processes until one that matters ends, or this process is told to.

    Parameters
    ----------
    children : sequence of Child
    tell : callable
        Takes a line when a process is started again.
    ready : callable, optional
        Called once when all are started.

    Returns
    -------
    int
        The exit status of the process that ended; 0 after SIGTERM or SIGINT.
    """
    told: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        told.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    running: list[tuple[Child, subprocess.Popen[bytes]]] = []
    try:
        running = [(child, _start(child)) for child in children]
        if ready:
            ready()
        while not told:
            for child, process in list(running):
                code = process.poll()
                if code is None:
                    continue
                running.remove((child, process))
                if child.when_it_ends == "stop":
                    tell(f"{child.name} ended ({code})")
                    return code or 1
                if child.when_it_ends == "restart" or code:
                    tell(f"{child.name} ended ({code}); it is started again")
                    time.sleep(_PAUSE)
                    running.append((child, _start(child)))
            time.sleep(0.2)
        return 0
    finally:
        _end(running)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(child: Child) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        child.command,
        env={**os.environ, **child.environment},
        start_new_session=True,  # Ctrl-C reaches this process, which ends them in order
        preexec_fn=partial(_end_with_parent, child.end) if sys.platform == "linux" else None,
    )


def _end_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to end this process when its parent is killed (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, number)


def _end(running: list[tuple[Child, subprocess.Popen[bytes]]]) -> None:
    for child, process in reversed(running):
        process.send_signal(child.end)
    deadline = time.monotonic() + _GRACE
    for _, process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

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
from threading import Thread
from types import FrameType
from typing import IO

_GRACE = 10.0  # seconds to end by itself, before a process is killed
_PAUSE = 2.0  # seconds before a process is started again


@dataclass(frozen=True)
class Child:
    """A process of a group.

    Attributes
    ----------
    name : str
    command : sequence of str
    environment : mapping of str to (str or None)
        Added to this process's own; None: not in it.
    when_it_ends : {"stop", "restart", "retry"}
        End all others too, start it again, or start it again unless it succeeded.
    end : signal.Signals
        What ends it, also when this process is killed (on Linux).
    on_line : callable, optional
        Takes each line that it prints, after that was printed here.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    when_it_ends: str = "stop"
    end: signal.Signals = signal.SIGTERM
    on_line: Callable[[str], None] | None = None


@dataclass(frozen=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    reader: Thread | None

    def ended(self) -> int | None:
        """Return its exit status once it has ended, and all that it printed was read."""
        code = self.process.poll()
        if code is not None and self.reader:
            self.reader.join(_PAUSE)  # no longer: a child of its own may keep the pipe open
        return code


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
    running: list[_Running] = []
    try:
        running = [_start(child) for child in children]
        if ready:
            ready()
        while not told:
            for each in list(running):
                child, code = each.child, each.ended()
                if code is None:
                    continue
                running.remove(each)
                if child.when_it_ends == "stop":
                    tell(f"{child.name} ended ({code})")
                    return code or 1
                if child.when_it_ends == "restart" or code:
                    tell(f"{child.name} ended ({code}); it is started again")
                    time.sleep(_PAUSE)
                    running.append(_start(child))
            time.sleep(0.2)
        return 0
    finally:
        _end(running)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(child: Child) -> _Running:
    read = child.on_line is not None
    environment = {**os.environ, **child.environment}
    process = subprocess.Popen(
        child.command,
        stdout=subprocess.PIPE if read else None,
        stderr=subprocess.STDOUT if read else None,
        env={name: value for name, value in environment.items() if value is not None},
        start_new_session=True,  # Ctrl-C reaches this process, which ends them in order
        preexec_fn=partial(_end_with_parent, child.end) if sys.platform == "linux" else None,
    )
    if child.on_line is None or process.stdout is None:
        return _Running(child, process, None)
    reader = Thread(target=_pass_on, args=(process.stdout, child.on_line), daemon=True)
    reader.start()
    return _Running(child, process, reader)


def _pass_on(output: IO[bytes], on_line: Callable[[str], None]) -> None:
    for raw in output:
        line = raw.decode(errors="replace")
        sys.stdout.write(line)
        sys.stdout.flush()
        on_line(line)


def _end_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to end this process when its parent is killed (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, number)


def _end(running: list[_Running]) -> None:
    for each in reversed(running):
        each.process.send_signal(each.child.end)
    deadline = time.monotonic() + _GRACE
    for each in running:
        try:
            each.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()

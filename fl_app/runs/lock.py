"""One process at a time attacks a run. Free of torch."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger("flwr")  # Flower streams it to the user

LOCK_FILE = ".attacking"


class RunIsHeldError(ValueError):
    """Another process attacks the run; the message says which."""


@contextmanager
def only_one(run_dir: Path, wait: bool = True) -> Iterator[None]:
    """Hold a run's attacks, for two processes would run each of them twice.

    One that dies lets go.

    Parameters
    ----------
    run_dir : Path
    wait : bool
        Wait for another process that holds them, and say which it is.

    Raises
    ------
    RunIsHeldError
        If another process holds them, without `wait`.
    """
    handle = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = f"{_holder(handle)} is attacking {run_dir}"
            if not wait:
                raise RunIsHeldError(f"{words}; wait for it, or end it first") from None
            _log.warning("%s; waiting for it. Ctrl-C here is safe: the queue stays", words)
            fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(
            OSError
        ):  # on a full disk nobody is told who holds it; it is held all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """Say who holds a lock, as its file tells."""
    pid = os.pread(handle, 20, 0).decode(errors="replace")
    return f"process {pid}" if pid.isdecimal() else "another process"

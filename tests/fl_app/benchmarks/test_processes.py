"""Work shared out to processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fl_app.benchmarks.processes import in_processes, shares


def _where(shared: str, number: int) -> tuple[str, int, int, int]:
    return shared, number, os.getpid(), torch.get_num_threads()


def test_calls_are_made_in_other_processes_that_share_the_threads() -> None:
    calls = [(number,) for number in range(6)]
    done = list(in_processes(_where, "x", calls, 2, "test", Console(quiet=True)))
    assert sorted((shared, number) for shared, number, *_ in done) == [("x", n) for n in range(6)]
    assert os.getpid() not in {pid for *_, pid, _ in done}
    assert {threads for *_, threads in done} == {shares(2)["threads"]}


def _tell_and_stay(folder: Path, number: int) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def stay(folder: str) -> None:
    """Share out a call that does not end."""
    list(in_processes(_tell_and_stay, Path(folder), [(0,)], 1, "test", Console(quiet=True)))


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def _wait(for_what: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not for_what() and time.monotonic() < end:
        time.sleep(0.1)
    return for_what()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as m; "
    parent = subprocess.Popen([sys.executable, "-c", f"{code}m.stay({str(tmp_path)!r})"])
    try:
        assert _wait(lambda: any(tmp_path.iterdir()))
    finally:
        parent.kill()
        parent.wait()
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    assert _wait(lambda: not _runs(worker))

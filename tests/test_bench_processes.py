"""Work shared out to processes."""

from __future__ import annotations

import os

import torch
from rich.console import Console

from fl_app.bench_processes import in_processes, shares


def _where(shared: str, number: int) -> tuple[str, int, int, int]:
    return shared, number, os.getpid(), torch.get_num_threads()


def test_calls_are_made_in_other_processes_that_share_the_threads() -> None:
    calls = [(number,) for number in range(6)]
    done = list(in_processes(_where, "x", calls, 2, "test", Console(quiet=True)))
    assert sorted((shared, number) for shared, number, *_ in done) == [("x", n) for n in range(6)]
    assert os.getpid() not in {pid for *_, pid, _ in done}
    assert {threads for *_, threads in done} == {shares(2)["threads"]}

"""What this machine's device does with a search: `flowleak bench device`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.common import ADAM, SGD
from fl_app.config import UNBOUNDED, AttackConfig, DatasetConfig
from fl_app.data import dataset_info, load_split
from fl_app.protocol import Budget
from fl_app.util.machine import device
from server_strategies.attacks.flow_matching import FlowMatching
from server_strategies.priors.flow import load_flow

_AN_ATTACK = 500  # iterations
_SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product is the measure of the device


@dataclass(frozen=True)
class Speed:
    """One search along the trajectory.

    Attributes
    ----------
    client : str
    iterations : float
        A second.
    flops : float
        Floating-point operations a second, in what `Reconstruction.flops` counts.
    peak : float
        Those of a product of matrices in float32.
    memory : int
        Bytes at most.
    """

    client: str
    iterations: float
    flops: float
    peak: float
    memory: int


def device_speeds(data: DatasetConfig, batches: Sequence[int], seconds: float) -> list[Speed]:
    """Search for the images of clients with SGD and Adam, K=5, by images a step.

    Parameters
    ----------
    data : DatasetConfig
    batches : sequence of int
        B of each client.
    seconds : float
        For each of them, after a few iterations that warm up.
    """
    where = "cuda" if torch.cuda.is_available() else "cpu"
    info, images = dataset_info(data), load_split(data, "test")
    prior, attack = load_flow("compact", where), FlowMatching(matching="trajectory")
    peak = _peak(where)
    speeds = []
    for client in (SGD, ADAM):
        for size in batches:
            case = Case(replace(client, batch_size=size), AttackConfig(), labels="by-step")
            seen, known, _ = draw_client(case, images, info, 0)
            attack(seen, known, prior, Budget(3, device=where))
            found = attack(seen, known, prior, Budget(UNBOUNDED, seconds, device=where))
            speeds.append(
                Speed(
                    case.client,
                    found.iterations / found.seconds,
                    found.flops / found.seconds,
                    peak,
                    found.peak_memory,
                )
            )
    return speeds


def table(speeds: Sequence[Speed]) -> Table:
    """Return the figures, a line for each client."""
    shown = Table(
        "client", "iterations/s", f"attacks a minute (x{_AN_ATTACK})", "GFLOP/s", "of the peak",
        "MB", title=device(),
    )  # fmt: skip
    for each in speeds:
        shown.add_row(
            each.client,
            f"{each.iterations:.2f}",
            f"{60 * each.iterations / _AN_ATTACK:.2f}",
            f"{each.flops / 1e9:.0f}",
            f"{each.flops / each.peak:.1%}",
            f"{each.memory / 1e6:.0f}",
        )
    return shown


def _peak(where: str) -> float:
    """Return floating-point operations a second of a product of matrices, the best of three."""
    side = _SIDES[where]
    square = torch.randn(side, side, device=where)
    best = torch.inf
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        (square @ square)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best

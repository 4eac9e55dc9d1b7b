"""How many attacks a minute workers take from the queue: `flowleak lan throughput`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import UNBOUNDED, AttackConfig, DatasetConfig, PoolConfig, PriorConfig
from fl_app.data import dataset_info, load_split
from fl_app.protocol import LocalTraining, Reconstruction
from server_strategies.attack_pool import AttackPool, Job


@dataclass(frozen=True)
class Throughput:
    """What so many workers took from the queue.

    Attributes
    ----------
    workers : int
    attacks : int
        Counted outcomes; the first one of each worker, which starts it, is none of them.
    seconds : float
        From the first to the last of them.
    spent : float
        Seconds that the attacks themselves took, together.
    """

    workers: int
    attacks: int
    seconds: float
    spent: float

    @property
    def a_minute(self) -> float:
        """Attacks a minute."""
        return 60 * self.attacks / self.seconds

    @property
    def share(self) -> float:
        """Share of the workers' time that attacks fill; the rest is what the queue costs."""
        return self.spent / (self.workers * self.seconds)


def throughput(
    workers: Sequence[int], attacks: int, seconds: float, folder: Path
) -> list[Throughput]:
    """Measure it for each number of workers, in processes of their own in a Ray of this machine.

    With ``RAY_ADDRESS``, in that cluster.

    Parameters
    ----------
    workers : sequence of int
    attacks : int
        Of each worker, after a first one.
    seconds : float
        Of an attack.
    folder : Path
        On the disk that the queue is written to.

    Raises
    ------
    RuntimeError
        If an attack fails.
    """
    data = DatasetConfig()
    attack = AttackConfig("flow_matching", UNBOUNDED, seconds)
    case = Case(LocalTraining("sgd", 0.01), attack)
    observation, knowledge, _ = draw_client(case, load_split(data, "test"), dataset_info(data), 0)
    return [
        _measured(count, attacks, Job(observation, knowledge, attack, PriorConfig(), 0), folder)
        for count in workers
    ]


def _measured(workers: int, attacks: int, job: Job, folder: Path) -> Throughput:
    ends: list[tuple[float, float]] = []  # of an attack, and its own seconds
    failed: list[str] = []

    def found(job: Job, result: Reconstruction, device: str) -> None:
        ends.append((time.monotonic(), result.seconds))

    def fail(job: Job, message: str) -> None:
        failed.append(message)

    with (
        tempfile.TemporaryDirectory(dir=folder) as name,
        AttackPool(Path(name), PoolConfig(workers=workers), found, fail) as pool,
    ):
        for _ in range(workers * (1 + attacks)):
            pool.submit(Job(job.observation, job.knowledge, job.attack, job.prior, job.seed))
        while pool.unfinished and not failed:
            time.sleep(0.1)
    if failed:
        raise RuntimeError(f"an attack failed: {failed[0]}")
    counted = ends[workers:]
    spent = sum(own for _, own in counted)
    return Throughput(workers, len(counted), counted[-1][0] - ends[workers - 1][0], spent)


def table(measured: Sequence[Throughput]) -> Table:
    """Return the figures, a line for each number of workers."""
    shown = Table("workers", "attacks", "seconds", "a minute", "share of the workers' time")
    for each in measured:
        shown.add_row(
            str(each.workers), str(each.attacks), f"{each.seconds:.1f}", f"{each.a_minute:.1f}",
            f"{each.share:.0%}",
        )  # fmt: skip
    return shown

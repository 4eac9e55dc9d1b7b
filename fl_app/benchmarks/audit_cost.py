"""What an audit costs the training that it watches: `flowleak lan cost`."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from rich.table import Table

from client_app.app import app as client_app
from fl_app.config import Config, WatchConfig, load_config
from fl_app.data import dataset_info
from fl_app.models import known_model
from fl_app.protocol import Observation
from fl_app.server_app import create_strategy
from server_strategies.attack_pool import Job, enqueue
from server_strategies.honest_but_curious import HonestButCurious
from server_strategies.observations import ObservationStore
from server_strategies.recorder import Recorder

MOST_OVERHEAD = 0.05  # of a round's wall time
LEAST_SPEED = 0.5  # of the disk's sequential speed
_PARTITIONS = 100  # of the images at most; more clients share them
_DISK_BYTES = 2**26  # that the disk's speed is taken from


@dataclass(frozen=True)
class AuditCost:
    """The measured cost.

    Attributes
    ----------
    plain, watched : list of float
        Seconds of each round without and with every client watched.
    store_speed, disk_speed : float
        Bytes a second of observations, and of one file of the same bytes, each
        flushed to the disk.
    """

    plain: list[float]
    watched: list[float]
    store_speed: float
    disk_speed: float

    @property
    def overhead(self) -> float:
        """How much longer the median round takes, as a share of it without the audit."""
        return statistics.median(self.watched) / statistics.median(self.plain) - 1

    def table(self) -> Table:
        """Return the figures beside their thresholds."""
        table = Table("", "without", "with", "", "threshold")
        plain, watched = statistics.median(self.plain), statistics.median(self.watched)
        table.add_row(
            f"round, median of {len(self.plain)}", f"{plain:.3f} s", f"{watched:.3f} s",
            f"{self.overhead:+.1%}", f"at most +{MOST_OVERHEAD:.0%}",
        )  # fmt: skip
        disk, store = (f"{speed / 1e6:.0f} MB/s" for speed in (self.disk_speed, self.store_speed))
        share = f"{self.store_speed / self.disk_speed:.0%}"
        table.add_row("disk, store", disk, store, share, f"at least {LEAST_SPEED:.0%}")
        return table

    def shortfalls(self) -> list[str]:
        """Say what misses its threshold."""
        short = []
        if self.overhead > MOST_OVERHEAD:
            short.append(f"a round takes {self.overhead:.1%} longer")
        if self.store_speed < LEAST_SPEED * self.disk_speed:
            short.append(f"the store has {self.store_speed / self.disk_speed:.0%} of the disk")
        return short


class _Clients(Grid):
    """The real ClientApp, one client after the other, in this process."""

    def __init__(self, clients: int, partitions: int, overrides: str) -> None:
        self._clients, self._partitions, self._overrides = clients, partitions, overrides

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._clients + 1)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return [self._call(message) for message in messages]

    def _call(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": (node - 1) % self._partitions},
            state=RecordDict(),
            run_config={"overrides": self._overrides},
        )
        return client_app(message, context)

    def set_run(self, run: Any) -> None: ...

    run: Any = None

    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def push_messages(self, messages: Iterable[Message]) -> Any: ...
    def pull_messages(self, message_ids: Iterable[str]) -> Any: ...


def audit_cost(rounds: int, clients: int, local_steps: int, folder: Path) -> AuditCost:
    """Measure rounds of real clients with and without the audit, taken in turn.

    The audit does all that it does beside a deployment's training: it copies and
    checks every client's update, writes it to the disk and queues its attack.
    The attacks themselves run elsewhere.

    Parameters
    ----------
    rounds : int
        Of each kind, after one that warms up.
    clients, local_steps : int
        Each client makes so many steps of one image with Adam on the ConvNet.
    folder : Path
        On the disk to measure.
    """
    partitions = min(clients, _PARTITIONS)
    overrides = f"num_clients={partitions} client.local_steps={local_steps} rounds={rounds}"
    overrides += " strategy.fraction_evaluate=0 audit.truth=false audit.labels=unknown"
    config = load_config({"overrides": overrides})
    for name in ("run_id", "node_id", "task_id"):  # Flower's messages ask whose they are
        setattr(TaskIdentity, name, 1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        store = ObservationStore(Path(name))
        for turn in range(rounds + 1):
            for watched in (False, True) if turn % 2 else (True, False):
                grid = _Clients(clients, partitions, overrides)
                taken = _round(config, grid, store if watched else None, Path(name))
                if turn:
                    seconds[watched].append(taken)
        ids = store.ids()
        observation = store.load(ids[0])
        store_speed, disk_speed = _speeds(store, observation, Path(name))
    return AuditCost(seconds[False], seconds[True], store_speed, disk_speed)


def _round(config: Config, grid: Grid, store: ObservationStore | None, run: Path) -> float:
    """Return the seconds of one round; the record may go on after it, as in a training."""
    info = dataset_info(config.dataset)
    knowledge = config.knowledge(info)
    model = known_model(knowledge, config.seed)
    arrays, strategy = ArrayRecord(model.state_dict()), create_strategy(config)
    if store is None:
        began = time.perf_counter()
        strategy.start(grid, arrays, 1)
        return time.perf_counter() - began

    def record(observation: Observation) -> None:
        store.save(observation)
        enqueue(run, Job(observation, knowledge, config.attack, config.prior, config.seed))

    def fail(round_: int, node: int, reason: str) -> None:
        raise RuntimeError(f"node {node} was not watched: {reason}")

    with Recorder(record, fail) as recorder:
        watching = HonestButCurious(
            strategy, watch=WatchConfig(), on_observation=recorder.add, on_skipped=fail
        )
        began = time.perf_counter()
        watching.start(grid, arrays, 1)
        return time.perf_counter() - began


def _speeds(store: ObservationStore, observation: Observation, folder: Path) -> tuple[float, float]:
    """Return the store's and the disk's speed in bytes a second, the best of three each."""
    size = sum(t.nbytes for w in (observation.w0, observation.w1) for t in w.values())
    number = max(1, _DISK_BYTES // size)
    data = os.urandom(size)
    stored, plain = [], []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(number):
            store.save(observation)
        stored.append(number * size / (time.perf_counter() - began))
        began = time.perf_counter()
        with (folder / "plain").open("wb") as file:
            for _ in range(number):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        plain.append(number * size / (time.perf_counter() - began))
    return max(stored), max(plain)

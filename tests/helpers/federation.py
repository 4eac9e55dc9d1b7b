"""A federation in this process: real and toy clients of a curious server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAvg,
    Strategy,
)
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app as client_app
from fl_app.config import WatchConfig
from fl_app.protocol import Observation
from server_strategies.honest_but_curious import HonestButCurious

NODES = 3


Client = Callable[[Message], Message]


class LocalGrid(Grid):
    """Calls each node's client in turn; replies share no memory with what was sent."""

    def __init__(self, clients: list[Client]) -> None:
        self.clients = dict(enumerate(clients, start=100))

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return [self.clients[message.metadata.dst_node_id](message) for message in messages]

    def set_run(self, run: object) -> None: ...
    def run(self) -> None: ...  # type: ignore[override]
    def create_message(self, *args: object, **kwargs: object) -> Message: ...  # type: ignore
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...  # type: ignore
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...  # type: ignore


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity that Flower gives to a client's or a server's."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def real_client(partition: int, overrides: str = "") -> Client:
    def call(message: Message) -> Message:
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config={"partition-id": partition, "num-partitions": NODES},
            state=RecordDict(),
            run_config={"overrides": overrides},
        )
        return client_app(message, context)

    return call


def toy_client(shift: float, partition: int, **changes: object) -> Client:
    """Return a client that adds a number to every weight, and breaks its reply as told."""

    def call(message: Message) -> Message:
        if "raises" in changes:
            return Message(Error(code=1, reason=str(changes["raises"])), reply_to=message)
        arrays = message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        arrays = {name: value.float() + shift for name, value in arrays.items()}
        arrays |= changes.get("arrays", {})  # type: ignore[operator]
        metrics = {"num-examples": changes.get("count", 2), "loss": 1.0}
        content = {
            "arrays": ArrayRecord({k: Array(v.numpy()) for k, v in arrays.items()}),
            "metrics": MetricRecord(metrics),  # type: ignore[arg-type]
            "client": ConfigRecord({"partition-id": partition}),
        }
        if message.metadata.message_type == "evaluate":
            del content["arrays"]
        return Message(RecordDict(content), reply_to=message)

    return call


def watch(
    inner: Strategy, seen: list[Observation], skipped: list[tuple[int, int, str]], **options: object
) -> HonestButCurious:
    return HonestButCurious(
        inner,
        watch=WatchConfig(**options),  # type: ignore[arg-type]
        on_observation=seen.append,
        on_skipped=lambda *facts: skipped.append(facts),
    )


def start(strategy: Strategy, clients: list[Client], rounds: int = 2, **config: str) -> ArrayRecord:
    random.seed(0)  # Flower samples nodes, and so orders the sum, by it
    np.random.seed(0)  # the DP wrapper's noise
    weights = {"weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}
    weights["bias"] = np.zeros(2, dtype=np.float32)
    arrays = ArrayRecord({name: Array(value) for name, value in weights.items()})
    result = strategy.start(LocalGrid(clients), arrays, rounds, train_config=ConfigRecord(config))
    return result.arrays


def average(**options: object) -> FedAvg:
    return FedAvg(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)

"""A user's own strategy, watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy
from helpers.federation import average, identity, start, toy_client
from helpers.foreign import client

import flowleak
from fl_app.config import ConfigError
from server_strategies.observations import ObservationStore

__all__ = ["identity"]  # a fixture that applies by itself


class Own(FedAvg):
    """A strategy with a start and attributes of its own, as Flower's advanced-pytorch has."""

    best = 0.0

    def start(self, *args: Any, **kwargs: Any) -> Any:
        self.best = 1.0
        return super().start(*args, **kwargs)


def _watched(strategy: Strategy, folder: Path, **options: Any) -> Strategy:
    return flowleak.watch(strategy, client=client(), runs_dir=folder, **options)


def test_a_strategy_keeps_its_start_and_is_recorded(tmp_path: Path) -> None:
    own = Own(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
    watched = _watched(own, tmp_path, rounds=[2], name="own")
    assert watched is own
    start(watched, [toy_client(0.5, 3), toy_client(1.0, 4)])
    assert own.best == 1.0
    store = ObservationStore(tmp_path / "own")
    seen = [store.load(id_) for id_ in store.ids()]
    assert [(each.round, each.client, each.num_examples) for each in seen] == [(2, 3, 2), (2, 4, 2)]


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_training_is_the_same_to_the_bit(kind: type[FedAvg], tmp_path: Path) -> None:
    def trained(watch: bool) -> ArrayRecord:
        strategy = kind(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
        strategy = _watched(strategy, tmp_path) if watch else strategy
        return start(strategy, [toy_client(0.5, 3), toy_client(1.0, 4)])

    plain, watched = trained(False), trained(True)
    assert {k: v.data for k, v in plain.items()} == {k: v.data for k, v in watched.items()}


def test_a_reply_with_another_key_or_no_count(tmp_path: Path) -> None:
    described = client(examples=6, examples_key="samples")
    strategy = flowleak.watch(average(), client=described, runs_dir=tmp_path, name="given")
    start(strategy, [toy_client(0.5, 3)], rounds=1)
    store = ObservationStore(tmp_path / "given")
    assert [store.load(id_).num_examples for id_ in store.ids()] == [6]
    strategy = flowleak.watch(
        average(), client=client(examples_key="loss"), runs_dir=tmp_path, name="by-key"
    )
    start(strategy, [toy_client(0.5, 3)], rounds=1)
    store = ObservationStore(tmp_path / "by-key")
    assert [store.load(id_).num_examples for id_ in store.ids()] == [1]


def test_what_is_wrong_is_said_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        flowleak.watch(average(), client="missing.py", runs_dir=tmp_path)
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(ConfigError, match="describes no client"):
        flowleak.watch(average(), client=tmp_path / "empty.py", runs_dir=tmp_path)
    with pytest.raises(ConfigError, match="rounds is"):
        flowleak.watch(average(), client=client(), runs_dir=tmp_path, rounds=[0])

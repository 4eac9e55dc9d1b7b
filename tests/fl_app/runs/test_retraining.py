"""A run's clients and federation, trained again with something changed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_app.audit.auditor import Auditor
from fl_app.config import load_config
from fl_app.data import dataset_info
from fl_app.models import known_model
from fl_app.protocol import Defense
from fl_app.runs.retraining import Federations, model_before


@pytest.fixture
def own(tmp_path: Path) -> Auditor:
    config = load_config({"overrides": "client.local_steps=1 num_clients=2 model.norm=group"})
    return Auditor(tmp_path, config, config.knowledge(dataset_info(config.dataset)))


def test_a_changed_model_begins_at_its_start_or_where_as_many_rounds_lead(own: Auditor) -> None:
    start = known_model(own.knowledge, own.config.seed).state_dict()
    first, second = model_before(1, own), model_before(2, own)
    assert first.keys() == second.keys() == start.keys() and "norm1.weight" in start
    assert all(torch.equal(first[name], start[name]) for name in start)
    moved = (second["classifier.weight"] - start["classifier.weight"]).abs()
    assert 0 < moved.max() < 0.01  # one step of Adam
    with pytest.raises(ValueError, match="starts from audit:2, weights of another model"):
        own.config = replace(own.config, start_from="audit:2")
        model_before(2, own)


class Here(Executor):
    """Calls at once, in this process."""

    calls = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_a_federation_is_trained_once(own: Auditor) -> None:
    federations = Federations(1, pool := Here())
    accuracy = federations.accuracy(own)
    assert accuracy and 0 < accuracy.result() < 1
    own.config = replace(own.config, defense=Defense(secagg=True))  # trains the same
    assert federations.accuracy(own) is accuracy and pool.calls == 1
    assert Federations(0, pool).accuracy(own) is None
    own.no_data = "gone"
    assert federations.accuracy(own) is None

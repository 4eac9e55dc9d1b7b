"""A run's clients and federation, trained again with something changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


def test_a_federation_is_trained_once(own: Auditor) -> None:
    assert Federations(0).accuracy(own) is None
    federations = Federations(1)
    accuracy = federations.accuracy(own)
    assert accuracy is not None and 0 < accuracy < 1
    federations._reached = dict.fromkeys(federations._reached, 0.5)
    own.config = replace(own.config, defense=Defense(secagg=True))  # trains the same
    assert federations.accuracy(own) == 0.5
    own.no_data = "gone"
    assert federations.accuracy(own) is None

"""The benchmark of the diagnosis: healthy clients have no alarm, planted faults are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fl_app.benchmarks import diagnosis
from fl_app.benchmarks.clients import Clients
from fl_app.benchmarks.diagnosis import FAULTS, SUITE, batch_norm_cnn
from fl_app.config import load_config
from fl_app.data import ImageSet
from fl_app.protocol import DatasetInfo, Knowledge
from server_strategies.attacks.labels import random_images

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.24, 0.26)


def some_clients() -> Clients:
    info = DatasetInfo(10, (3, 32, 32), MEAN, STD)
    known = Knowledge("mlp", 10, info.image_shape, MEAN, STD, None)
    generator = torch.Generator().manual_seed(5)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    images = random_images(64, known, generator) * std + mean
    labels = torch.randint(10, (64,), generator=generator)
    return Clients(ImageSet((255 * images).byte(), labels), info)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_planted_faults_are_found_and_a_healthy_client_has_none(optimizer: str) -> None:
    (case,) = (
        case for case in SUITE.cases
        if case.model is batch_norm_cnn and case.training.optimizer == optimizer
        and case.training.local_steps == 5
    )  # fmt: skip
    assert case.client.startswith(f"batch_norm_cnn {optimizer} ")
    setting = diagnosis.Setting(load_config({}).dataset, trials=1)
    rows = SUITE.trial(case, 0, some_clients(), setting)
    others = {"sgd": "SGD, not Adam", "adam": "Adam, not SGD"}
    assert {row["planted"] for row in rows} == {"", *FAULTS} - {others[optimizer]}
    assert SUITE.shortfalls(rows) == []
    head, *lines = SUITE.cells(rows)
    assert len(lines) == len(rows) + 2 and all(len(line) == len(head) for line in lines)
    assert lines[-1][:5] == ["all", "some fault", "8", "8", "8"]
    silent = [{**row, "diagnosis": []} for row in rows]
    assert len(SUITE.shortfalls(silent)) == len(rows) - 1
    loud = [{**rows[0], "diagnosis": ["clamped"]}, {**rows[0], "diagnosis": ["it hardly depends "]}]
    assert len(SUITE.shortfalls(loud)) == 2
    honest = [{**rows[0], "diagnosis": ["the update hardly depends on the images"]}]
    assert SUITE.shortfalls(honest) == []


def test_it_has_a_hundred_healthy_clients_in_two_trials() -> None:
    assert 2 * len({case.client for case in SUITE.cases}) == 120
    assert len({replace(case.training, local_steps=1) for case in SUITE.cases}) == 2

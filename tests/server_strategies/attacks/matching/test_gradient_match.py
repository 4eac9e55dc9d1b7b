"""The client's mean step: against its gradient, and against torch's own momentum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.clients import client
from helpers.matching import true_gradient

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.gradient_match import mean_step

SGD = LocalTraining("sgd", lr=0.05, batch_size=6, local_steps=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_one_step_of_sgd_is_its_gradient(settings: dict) -> None:
    training = replace(SGD, **settings)
    observation, knowledge, x = client(training, torch.float64)
    w0, w1 = list(observation.w0.values()), list(observation.w1.values())
    for found, true in zip(
        mean_step(w0, w1, training, 1), true_gradient(observation, knowledge, x), strict=True
    ):
        assert torch.allclose(found, true, atol=1e-12)


def test_a_client_clips_its_gradient() -> None:
    for bound, clipped in ((0.1, True), (100.0, False)):
        training = replace(SGD, max_grad_norm=bound)
        observation, knowledge, x = client(training, torch.float64)
        w0, w1 = list(observation.w0.values()), list(observation.w1.values())
        found = torch.cat([r.flatten() for r in mean_step(w0, w1, training, 1)])
        true = torch.cat([g.flatten() for g in true_gradient(observation, knowledge, x)])
        expected = true * bound / true.norm() if clipped else true
        assert torch.allclose(found, expected, atol=1e-6)


def test_momentum_applies_a_gradient_again() -> None:
    # A constant gradient of 1: velocities 1, 1.9, 2.71 after which Nesterov looks ahead once more.
    for nesterov, worth in ((False, 1 + 1.9 + 2.71), (True, 1.9 + 2.71 + 3.439)):
        training = replace(SGD, momentum=0.9, nesterov=nesterov, lr=0.5)
        w = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9, nesterov=nesterov)
        for _ in range(3):
            w.grad = torch.ones(1)
            optimizer.step()
        assert w.item() == pytest.approx(-0.5 * worth)
        found = mean_step([torch.zeros(1)], [w.detach()], training, 3)
        assert found[0].item() == pytest.approx(1)

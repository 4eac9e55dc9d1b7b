"""The yardstick measures the same work as ours."""

from __future__ import annotations

import pytest
import torch
from helpers.clients import CLIENTS, client

from fl_app.benchmarks.costs import PlainSurrogate
from fl_app.benchmarks.device import device_speeds
from fl_app.benchmarks.step_costs import PlainSimulation
from fl_app.config import DatasetConfig
from server_strategies.attacks.matching import matching_objective


def test_the_plain_loop_is_the_same_surrogate() -> None:
    observation, knowledge, x = client(CLIENTS["sgd"])
    x = x.flip(0).requires_grad_()
    surrogate = matching_objective("surrogate", observation, knowledge, alpha=0.3)
    alpha = surrogate.unknowns[0].value
    ours, on_alpha = torch.autograd.grad(surrogate(x, 0.0), [x, alpha])
    theirs, expected = PlainSurrogate(observation, knowledge).gradients(x, 0.3)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7)
    assert on_alpha.item() == pytest.approx(expected, rel=1e-3)


def test_the_plain_simulation_is_the_same_trajectory() -> None:
    observation, knowledge, x = client(CLIENTS["sgd"])
    x = x.flip(0).requires_grad_()
    trajectory = matching_objective("trajectory", observation, knowledge, distance="squared")
    loss, expected = trajectory(x, 0.0), PlainSimulation(observation, knowledge)(x)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,), (theirs,) = (torch.autograd.grad(each, x) for each in (loss, expected))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_device_is_measured_by_its_searches() -> None:
    speeds = device_speeds(DatasetConfig(), [1], seconds=0.1)
    assert [each.client for each in speeds] == ["sgd 0.01 K=5 B=1", "adam 0.001 K=5 B=1"]
    assert all(each.iterations > 0 and each.flops > 0 and each.peak > 0 for each in speeds)

"""Attacks on real clients at tiny budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_explain import CLIENTS, SHAPE, client
from torch import Tensor

from fl_app.audit.metrics import score
from fl_app.bench import Case, draw_client
from fl_app.config import AttackConfig, ConfigError, DatasetConfig, PriorConfig
from fl_app.data import dataset_info, load_split
from fl_app.protocol import Budget, LocalTraining
from server_strategies.attacks import ATTACKS, check_attack, run_attack
from server_strategies.attacks.flow_matching import flow_matching
from server_strategies.attacks.optimise import AttackError, optimise, step_schedule
from server_strategies.priors.flow import load_flow

ONE_STEP = replace(CLIENTS["sgd"], batch_size=6, local_steps=1)


class Target:
    """An explanation whose answer is known: one image, reached at loss 0."""

    name = "target"
    reason = "known"

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.alpha = torch.tensor(0.5, requires_grad=True)
        self.unknowns = [self.alpha]

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.answer).square().mean() + (self.alpha + 1).square()


def test_the_loop_finds_a_known_answer_inside_the_box() -> None:
    _, knowledge, x = client(ONE_STEP)
    target = Target(x + 9)  # outside: no pixel may pass 1
    options = {"lr": 0.5, "schedule": step_schedule, "options": {}}
    found = optimise(
        "test", target, [], knowledge, Budget(200), unknowns_lr=0.1, **options
    )  # fmt: skip
    assert found.images.min() >= 0
    assert torch.allclose(found.images, torch.ones_like(found.images))
    assert target.alpha.item() == 0  # boxed too
    assert (found.iterations, found.stop_reason) == (200, "iterations")
    assert len(found.losses) == 200
    assert found.losses[-1] < found.losses[0]


def test_the_loop_stops_in_time_and_on_nonsense() -> None:
    _, knowledge, x = client(ONE_STEP)
    options = {"lr": 0.1, "schedule": step_schedule, "options": {}}
    found = optimise("test", Target(x), [], knowledge, Budget(10**6, seconds=0.2), **options)
    assert found.stop_reason == "seconds"
    assert 0 < found.iterations < 10**6
    with pytest.raises(AttackError, match="not finite"):
        optimise("test", Target(x * torch.nan), [], knowledge, Budget(3), **options)


@pytest.mark.parametrize("training", ["sgd", "adam"])
def test_a_photograph_is_reconstructed(training: str) -> None:
    config = DatasetConfig("photos")
    images, info = load_split(config, "test"), dataset_info(config)
    case = Case(LocalTraining(training, lr=1e-3, local_steps=2), AttackConfig())
    observation, knowledge, truth = draw_client(case, images, info, seed=3)
    found = flow_matching(observation, knowledge, load_flow("compact"), Budget(60))
    leakage = score(found, truth, info.mean)
    psnr = leakage.metrics["psnr"]
    assert psnr is not None
    assert psnr.mean > psnr.baseline + 5


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("training", ["sgd", "adam"])
def test_every_attack_runs_is_seeded_and_accounts_for_itself(name: str, training: str) -> None:
    observation, knowledge, _ = client(CLIENTS[training])
    attack = AttackConfig(name, iterations=3)
    seen: list[int] = []
    first, again, other = (
        run_attack(observation, knowledge, attack, PriorConfig(), seed, lambda i, _: seen.append(i))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (6, *SHAPE)
    assert first.flops > 0
    assert first.losses[-1] < first.losses[0]
    assert first.options


def test_unknown_attacks_and_options_are_refused() -> None:
    check_attack(AttackConfig("sme", options={"lr": 1, "explain": "auto"}))
    check_attack(AttackConfig("flow_matching", options={"lr": 0.1}))
    with pytest.raises(ConfigError, match="allowed: flow_matching, sme"):
        check_attack(AttackConfig("magic"))
    with pytest.raises(ConfigError, match="allowed for sme: explain, lr, tv"):
        check_attack(AttackConfig("sme", options={"weight": 1}))
    with pytest.raises(ConfigError, match="lr is 'fast'; allowed: a number"):
        check_attack(AttackConfig("sme", options={"lr": "fast"}))
    with pytest.raises(ConfigError, match="mode is 3; allowed: a word"):
        check_attack(AttackConfig("flow_matching", options={"mode": 3}))

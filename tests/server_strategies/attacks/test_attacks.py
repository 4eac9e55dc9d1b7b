"""Attacks on real clients at tiny budgets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.clients import CLIENTS, MEAN, SHAPE, STD, client
from torch import Tensor, nn

from client_app.training import train
from fl_app.audit.metrics import score
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import AttackConfig, ConfigError, DatasetConfig, PriorConfig
from fl_app.data import dataset_info, load_split
from fl_app.models import create_model
from fl_app.protocol import Budget, Knowledge, LocalTraining, Observation, Reconstruction
from fl_app.registry import ATTACKS
from server_strategies.attacks.accounting import AttackError, Run
from server_strategies.attacks.flow_matching import FlowMatching
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.base import MatchingObjective, Setting, Unknown
from server_strategies.attacks.optimise import Parts, _better_order, optimise, step_schedule
from server_strategies.attacks.run import create_attack, run_attack
from server_strategies.priors.flow import load_flow

ONE_STEP = replace(CLIENTS["sgd"], batch_size=6, local_steps=1)


class Target(MatchingObjective):
    """An objective whose answer is known: the images, reached at loss 0."""

    name = "target"

    def __init__(self, observation: Observation, knowledge: Knowledge, answer: Tensor) -> None:
        model = create_model("convnet", 10, SHAPE)
        super().__init__(Setting(model, observation, knowledge, "known"))
        self.answer = answer
        self.alpha = torch.tensor(0.5, requires_grad=True)
        self.unknowns = [Unknown(self.alpha, lr=0.1)]

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        return (x - self.answer).square().mean() + (self.alpha + 1).square()


def loop(
    objective: MatchingObjective, observation: Observation, budget: Budget, **options: Any
) -> Reconstruction:
    settings = {"lr": 0.5, "schedule": step_schedule, **options}
    return optimise(Parts(objective, **settings), observation, budget)


def test_the_loop_finds_a_known_answer_inside_the_box() -> None:
    observation, knowledge, x = client(ONE_STEP)
    target = Target(observation, knowledge, x + 9)  # outside: no pixel may pass 1
    found = loop(target, observation, Budget(200))
    assert found.images.min() >= 0
    assert torch.allclose(found.images, torch.ones_like(found.images))
    assert target.alpha.item() == 0  # boxed too
    assert (found.iterations, found.stop_reason) == (200, "iterations")
    assert len(found.losses) == 200
    assert found.losses[-1] < found.losses[0]


def test_the_loop_starts_where_the_objective_says() -> None:
    observation, knowledge, x = client(ONE_STEP)
    target = Target(observation, knowledge, x)
    target.start = x
    assert loop(target, observation, Budget(1)).losses[0] == pytest.approx(1.5**2)


def test_without_their_order_labels_are_reassigned_with_their_images() -> None:
    observation, knowledge, x = client(CLIENTS["sgd"], count=6)
    counted = knowledge.granting("counts")
    assert knowledge.labels and counted.labels != knowledge.labels
    # The right labels and images, but for the first and the third: those of the first two steps.
    swapped = [2, 1, 0, 3, 4, 5]
    labels = tuple(knowledge.labels[place] for place in swapped)
    assert labels != knowledge.labels
    objective = matching_objective("trajectory", observation, replace(counted, labels=labels))
    pairs = objective.reassignments()
    steps = [step for step in range(3) for _ in range(2)]
    assert pairs == [(a, b) for a in range(6) for b in range(a, 6) if steps[a] != steps[b]]
    assert any(labels[a] != labels[b] for a, b in pairs)
    objective.start = x[swapped]
    found = loop(objective, observation, Budget(3 * len(pairs)), lr=1e-4)
    right = (x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)).clamp(0, 1)
    assert found.labels == knowledge.labels
    assert torch.allclose(found.images, right, atol=2e-2)
    # By step the order is known, and another class has no place there.
    by_step = matching_objective("trajectory", observation, knowledge)
    assert all(knowledge.labels[a] == knowledge.labels[b] for a, b in by_step.reassignments())


def test_images_of_a_class_in_each_others_step_are_reassigned() -> None:
    training = CLIENTS["sgd"]
    observation, knowledge, x = client(training, count=6)
    one_class = replace(knowledge, labels=(4, 1, 4, 2, 3, 5))
    model = create_model("convnet", 10, SHAPE, seed=1)
    batches = [torch.tensor(batch) for batch in training.batches(6)]
    train(model, x, torch.tensor(one_class.labels), batches, training, (0, 0, 0), (1, 1, 1))
    seen = replace(observation, w1=model.state_dict())
    objective = matching_objective("trajectory", seen, one_class)
    assert objective.reassignments() == [(0, 2)]  # of the first and the second local step
    assert (
        matching_objective("trajectory", seen, one_class.granting("unknown")).reassignments() == []
    )
    objective.start = x[[2, 1, 0, 3, 4, 5]]
    found = loop(objective, seen, Budget(4), lr=1e-3)
    right = (x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)).clamp(0, 1)
    assert torch.allclose(found.images, right, atol=1e-3)
    # In their own steps they stay.
    objective.start = x
    assert torch.allclose(loop(objective, seen, Budget(4), lr=1e-3).images, right, atol=1e-3)


@pytest.mark.parametrize(
    ("loss", "progress", "made"),
    [(1.04, 0.0, True), (1.06, 0.0, False), (1.04, 0.5, False), (0.99, 1.0, True)],
)
def test_a_reassignment_may_raise_the_loss_a_little_at_first(
    loss: float, progress: float, made: bool
) -> None:
    observation, knowledge, x = client(ONE_STEP, count=3)
    objective = Target(observation, replace(knowledge, labels=(7, 8, 9)), x)
    objective.__class__ = type("Flat", (Target,), {"__call__": lambda *_: torch.tensor(loss)})
    order = _better_order(objective, x, progress, torch.tensor(1.0), (0, 2))
    assert order.tolist() == ([2, 1, 0] if made else [0, 1, 2])
    assert objective.labels.tolist() == ([9, 8, 7] if made else [7, 8, 9])  # with the images


@pytest.mark.parametrize("prior_strength", [0.5, 2.0])
def test_the_prior_strength_holds_for_every_image(prior_strength: float) -> None:
    # The objective hardly depends on some of the images.
    observation, knowledge, x = client(CLIENTS["sgd"])
    target = Target(observation, knowledge, torch.zeros_like(x))
    weight = torch.tensor([1.0, 0.5, 0.1, 0.01, 1e-3, 1e-4]).view(-1, 1, 1, 1)
    target.start = torch.full_like(x, 0.1)
    target.alpha.data.zero_()
    target.__class__ = type(
        "Weak", (Target,), {"__call__": lambda self, x, _: (weight * x).sum() + 0 * self.alpha}
    )
    # The prior's gradient is opposite: the larger one decides the sign, for every image.
    found = loop(
        target,
        observation,
        Budget(1),
        priors=[lambda images, _: -images.sum()],
        prior_strength=lambda _: prior_strength,
    )
    start = target.start * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    assert torch.equal(
        found.images > start, torch.full_like(start, prior_strength > 1, dtype=torch.bool)
    )


def test_the_optimiser_restarts_where_the_objective_says_and_images_may_stand_still() -> None:
    class Halting(Target):
        restart = 0.6
        reached: tuple[Tensor, ...] = ()

        def __call__(self, x: Tensor, progress: float) -> Tensor:
            if progress < self.restart:
                return super().__call__(x, progress)
            self.reached += (x.detach().clone(),)
            return -super().__call__(x, progress)  # another loss

        def pace(self) -> Tensor | None:
            return torch.tensor([0.0, 1, 1, 1, 1, 1]) if self.reached else None

    observation, knowledge, x = client(ONE_STEP)
    halting = Halting(observation, knowledge, x.flip(2))
    halting.start = x
    progress: list[float] = []
    schedule = lambda share: progress.append(share) or 1.0  # noqa: E731
    # Near a start it is a hundredth.
    found = loop(halting, observation, Budget(5), lr=1.0, schedule=schedule)
    assert progress == pytest.approx([0, 1 / 3, 2 / 3, 0, 0.5])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    at_restart, later = halting.reached
    moved = (found.images - (at_restart * std + mean)).abs().amax((1, 2, 3))
    assert moved[0] < 1e-6
    assert (moved[1:] > 1e-3).all()
    # The first step after it is a first step of Adam, which no earlier gradient slows.
    assert (later - at_restart)[1:].abs().median().item() == pytest.approx(0.01, rel=1e-3)


def test_the_loop_stops_in_time_and_on_nonsense() -> None:
    observation, knowledge, x = client(ONE_STEP)
    budget = Budget(10**6, seconds=0.2)
    found = loop(Target(observation, knowledge, x), observation, budget)
    assert found.stop_reason == "seconds"
    assert 0 < found.iterations < 10**6
    found = loop(
        Target(observation, knowledge, x), observation, Budget(500, recovery_threshold=1.01)
    )  # alpha stays in its box: 1 is the least loss
    assert found.stop_reason == "recovery threshold"
    assert found.losses[-1] <= 1.01 < found.losses[0]
    with pytest.raises(AttackError, match="not finite"):
        loop(Target(observation, knowledge, x * torch.nan), observation, Budget(3))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the process's")
def test_the_peak_memory_of_a_second_attack_is_its_own() -> None:
    class Hungry(Target):
        def __call__(self, x: Tensor, progress: float) -> Tensor:
            blocks = [torch.ones(10_000) for _ in range(2_000)]  # 80 MB
            self.kept = blocks[-1]  # so that the C library keeps the rest when it is freed
            return super().__call__(x, progress)

    observation, knowledge, x = client(ONE_STEP)
    hungry = Hungry(observation, knowledge, x)
    for _ in range(3):
        assert loop(hungry, observation, Budget(1)).peak_memory == pytest.approx(80e6, rel=0.2)


@pytest.mark.parametrize("training", ["adam", None])
def test_what_the_server_does_not_know_is_inferred(training: str | None) -> None:
    observation, knowledge, _ = client(CLIENTS["adam"])
    less = replace(knowledge.granting("unknown"), training=CLIENTS["adam"] if training else None)
    found = FlowMatching()(observation, less, budget=Budget(2))
    assert found.labels_source != "given"
    assert "labels inferred by" in found.matching
    assert ("training guessed (adam" in found.matching) == (training is None)


@pytest.mark.parametrize("training", ["sgd", "adam"])
def test_a_photograph_is_reconstructed(training: str) -> None:
    config = DatasetConfig("photos")
    images, info = load_split(config, "test"), dataset_info(config)
    case = Case(LocalTraining(training, lr=1e-3, local_steps=2), AttackConfig())
    observation, knowledge, truth = draw_client(case, images, info, seed=3)
    found = FlowMatching()(observation, knowledge, load_flow("compact"), Budget(60))
    leakage = score(found, truth, info.mean)
    psnr = leakage.metrics["psnr"]
    assert psnr is not None
    assert psnr.mean > psnr.baseline + 5


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "feature_regression"])
@pytest.mark.parametrize("training", ["sgd", "adam"])
def test_every_search_runs_is_seeded_and_accounts_for_itself(name: str, training: str) -> None:
    observation, knowledge, _ = client(CLIENTS[training])
    # A gradient at w0 says too little of a client that uses Adam.
    options = {"matching": "auto"} if training == "adam" else {}
    attack = AttackConfig(name, iterations=3, options=options)
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
    assert first.attack == name
    assert first.options["matching"] == options.get("matching", ATTACKS[name]().matching)


def test_a_prior_of_weight_0_is_left_out() -> None:
    class Refuses(nn.Module):
        multiple = 4

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise AssertionError("the network ran")

    observation, knowledge, _ = client(ONE_STEP)
    found = FlowMatching(flow=0, tv=0)(observation, knowledge, Refuses(), Budget(2))
    assert found.iterations == 2
    with pytest.raises(AssertionError, match="the network ran"):
        FlowMatching(tv=0)(observation, knowledge, Refuses(), Budget(2))


def test_unknown_attacks_and_options_are_refused() -> None:
    create_attack(AttackConfig("sme", options={"lr": 1, "matching": "auto"}))
    create_attack(AttackConfig("flow_matching", options={"lr": 0.1}))
    with pytest.raises(
        ConfigError, match="allowed: dlf, dlg, dropout_inversion, feature_regression"
    ):
        create_attack(AttackConfig("magic"))
    with pytest.raises(ConfigError, match="allowed for sme: matching, alpha, lr, tv"):
        create_attack(AttackConfig("sme", options={"weight": 1}))
    with pytest.raises(ConfigError, match="lr is 'fast'; allowed: a number"):
        create_attack(AttackConfig("sme", options={"lr": "fast"}))
    with pytest.raises(ConfigError, match="mode is 3; allowed: denoiser, velocity"):
        create_attack(AttackConfig("flow_matching", options={"mode": 3}))


def test_flow_matching_runs_its_network_only_where_it_is_asked_to() -> None:
    observation, knowledge, _ = client(CLIENTS["sgd"])
    network, calls = load_flow("compact"), []
    network.register_forward_hook(lambda *_: calls.append(1))

    def attack(**options: float) -> Tensor:
        calls.clear()
        return FlowMatching(**options)(observation, knowledge, network, Budget(5)).images

    usual = attack()
    assert len(calls) == 5
    # Iterations 0 and 2 of 0 to 3; the last of the five is the polish.
    assert not torch.equal(attack(every=2, polish=0.2), usual)
    assert len(calls) == 2
    attack(flow=0, tv=0)
    assert not calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_no_iteration_waits_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    iterations = Run.iterations

    def watched(self: Run) -> Iterator[float]:
        for number, progress in enumerate(iterations(self)):
            # The first ones find out what is cheaper in another form.
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            yield progress
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "iterations", watched)
    monkeypatch.setattr(Run, "note", lambda self, loss: None)  # reads a loss once a second
    observation, knowledge, _ = client(CLIENTS[name])
    try:
        budget = Budget(iterations=12, device="cuda")
        FlowMatching(matching="trajectory")(observation, knowledge, budget=budget)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Every setting of a client's training: simulated as the project's own client trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.clients import SHAPE, client
from helpers.matching import objective_of
from torch import Tensor
from torch.nn import functional as F

from client_app.training import choose_batches
from fl_app.models import create_model
from fl_app.models.extensions import local_loss
from fl_app.protocol import Budget, LocalTraining, Observation
from server_strategies.attacks import labels as labels_module
from server_strategies.attacks.attack import Attack
from server_strategies.attacks.diagnosis import diagnose
from server_strategies.attacks.flow_matching import FlowMatching
from server_strategies.attacks.infer import infer
from server_strategies.attacks.inverting_gradients import InvertingGradients
from server_strategies.attacks.labels import infer_labels
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.passes import Passes
from server_strategies.attacks.matching.simulation import simulate

SMOOTH = {"eps": 0.01}  # far from where a derivative is steep


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of a user's own."""
    each = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-each)).square() * each).mean()


TRAININGS: dict[str, dict[str, Any]] = {
    "rmsprop": {"optimizer": "rmsprop"},
    "rmsprop, all options": {
        "optimizer": "rmsprop",
        "weight_decay": 0.01,
        "optimizer_options": {"alpha": 0.9, "centered": True, "momentum": 0.5},
    },
    "adagrad": {"optimizer": "adagrad", "optimizer_options": {"lr_decay": 0.1}},
    "adadelta": {"optimizer": "adadelta", "weight_decay": 0.01},
    "nadam": {"optimizer": "nadam"},
    "radam": {"optimizer": "radam", "local_steps": 8},  # its first five steps are not rectified
    "adamax": {"optimizer": "adamax"},
    "asgd": {"optimizer": "asgd", "schedule": (1.0, 0.5)},
    "amsgrad": {"optimizer": "adam", "optimizer_options": {"amsgrad": True}},
    "betas": {"optimizer": "adamw", "optimizer_options": {"betas": [0.8, 0.99], "eps": 1e-4}},
    "dampening": {"optimizer": "sgd", "momentum": 0.9, "optimizer_options": {"dampening": 0.3}},
    "maximize": {"weight_decay": 0.1, "optimizer_options": {"maximize": True}},
    "maximize, adam": {"optimizer": "adam", "optimizer_options": {"maximize": True}},
    "mse": {"loss": "mse"},
    "bce": {"loss": "bce", "optimizer": "adam"},
    "callable": {"loss": focal},
    "label smoothing": {"label_smoothing": 0.1},
    "class weights": {"class_weights": [0.5 + c for c in range(10)], "label_smoothing": 0.1},
    "schedule": {"schedule": (0.0, 1.0, 0.5), "momentum": 0.9, "nesterov": True},
    "schedule, adamw": {"schedule": (1.0, 0.5), "optimizer": "adamw", "weight_decay": 0.1},
    "drop last": {"drop_last": True, "local_steps": 0, "batch_size": 4, "local_epochs": 2},
    "accumulate": {"accumulate": 2, "max_grad_norm": 0.5, "optimizer": "adam"},
    "proximal": {"proximal": 1.0, "accumulate": 2},
    "trainable": {"trainable": ("classifier.*",), "optimizer": "adam", "weight_decay": 0.1},
    "groups": {
        "groups": [{"pattern": "*.bias", "weight_decay": 0.0}, {"pattern": "c*", "lr": 0.02}],
        "weight_decay": 0.1,
        "momentum": 0.9,
    },
    "groups, rmsprop": {
        "groups": [{"pattern": "*.bias", "lr": 0.02}],
        "optimizer": "rmsprop",
        "schedule": (1.0, 0.5),
        "trainable": ("*.bias", "classifier.weight"),
        "label_smoothing": 0.1,
        "proximal": 0.1,
    },
}


def training_of(name: str, **others: Any) -> LocalTraining:
    few = {"optimizer": "sgd", "batch_size": 2, "local_steps": 5} | TRAININGS[name] | others
    training = LocalTraining(**few)
    return replace(training, lr=2e-3 if training.adaptive else 0.05)


def simulated(
    observation: Observation, training: LocalTraining, x: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    batches = [(x[list(b)], labels[list(b)]) for b in training.batches(len(x))]
    return simulate(create_model("mlp", 10, SHAPE).to(x), observation.w0, batches, training)


@pytest.mark.parametrize("name", TRAININGS)
def test_the_simulation_is_the_clients_training(name: str) -> None:
    training = training_of(name)
    observation, knowledge, x = client(training, torch.float64, architecture="mlp")
    found = simulated(observation, training, x, torch.tensor(knowledge.labels))
    longest = max(update.abs().max() for update in observation.update.values())
    assert longest > 1e-6
    for key, expected in observation.w1.items():
        assert (found[key] - expected).abs().max() <= 1e-9 * longest, key
        assert torch.equal(expected, observation.w0[key]) != training.trains(key)


@pytest.mark.parametrize("optimizer", ["rmsprop", "nadam", "adagrad", "adadelta"])
def test_its_derivative_is_that_of_finite_differences(optimizer: str) -> None:
    others = {"weight_decay": 0.1, "accumulate": 2, "proximal": 0.5, "label_smoothing": 0.1}
    training = training_of(optimizer, optimizer_options=SMOOTH, **others)
    observation, knowledge, x = client(training, torch.float64, architecture="mlp")
    labels = torch.tensor(knowledge.labels)
    generator = torch.Generator().manual_seed(0)
    adjoint = {
        n: torch.randn(w.shape, generator=generator).double() for n, w in observation.w0.items()
    }

    def value(images: Tensor) -> Tensor:
        weights = simulated(observation, training, images, labels)
        return torch.stack([(adjoint[n] * w).sum() for n, w in weights.items()]).sum()

    leaf = x.clone().requires_grad_()
    value(leaf).backward()
    assert leaf.grad is not None
    direction = torch.randn(x.shape, generator=generator).to(x)
    apart = 1e-6 * direction
    expected = (value(x + apart) - value(x - apart)) / 2e-6
    assert (leaf.grad * direction).sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_units_without_a_gradient_have_a_finite_derivative() -> None:
    training = training_of("rmsprop")
    observation, knowledge, x = client(training, architecture="mlp")
    black = torch.zeros_like(x).requires_grad_()
    weights = simulated(observation, training, black, torch.tensor(knowledge.labels))
    sum(w.square().sum() for w in weights.values()).backward()
    assert black.grad is not None and black.grad.isfinite().all()


@pytest.mark.parametrize("name", ["class weights", "label smoothing", "mse", "bce"])
def test_a_certain_probability_is_a_label(name: str) -> None:
    """So that fitted labels end at the client's own loss."""
    logits, labels = torch.randn(3, 10).double(), torch.tensor([0, 2, 2])
    first, second = (
        local_loss(torch.nn.Identity(), logits, y, training_of(name)).item()
        for y in (labels, F.one_hot(labels, 10).double())
    )
    assert first == pytest.approx(second)


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "drop last"])
def test_auto_simulates_what_is_not_plain_and_others_refuse_it(name: str) -> None:
    observation, knowledge, _ = client(training_of(name), architecture="mlp")
    objective = matching_objective("auto", observation, knowledge)
    assert objective.name == "trajectory"
    why = knowledge.client.beyond()
    assert why and why in objective.reason
    for kind in ("low_rank", "fingerprints", "inversion"):
        with pytest.raises(ValueError, match=f"matching is '{kind}'|can't be inverted"):
            matching_objective(kind, observation, knowledge)
    if knowledge.client.beyond("loss", "label_smoothing", "class_weights", "trainable", "proximal"):
        for kind in ("gradient", "surrogate", "sign"):
            with pytest.raises(ValueError, match=f"matching is '{kind}', which does not know"):
                matching_objective(kind, observation, knowledge)
    healthy = diagnose(observation, knowledge, [0.01], None)
    assert not healthy


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["label smoothing", "mse", "class weights", "trainable"])
def test_one_steps_gradient_is_that_of_the_clients_loss(name: str, optimizer: str) -> None:
    one = {"optimizer": optimizer, "weight_decay": 0.1, "batch_size": 6, "local_steps": 1}
    observation, knowledge, x = client(training_of(name, **one), architecture="mlp")
    objective = matching_objective("auto", observation, knowledge)
    assert objective.name == ("gradient" if optimizer == "sgd" else "inversion")
    assert objective(x, 0.0).item() == pytest.approx(0, abs=0.02)  # float32 hides some of Adam's
    assert objective(torch.zeros_like(x), 0.0).item() > 0.1


def test_the_last_batch_may_be_left_out() -> None:
    training = LocalTraining(batch_size=4, local_steps=0, local_epochs=2, drop_last=True)
    assert training.batches(10) == ((0, 1, 2, 3), (4, 5, 6, 7)) * 2
    assert (training.steps_a_pass(10), training.passes(10)) == (2, 2)
    chosen = choose_batches(10, training, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in chosen] == [4] * 4
    assert len(set(torch.cat(chosen[:2]).tolist())) == 8
    for refused in (
        lambda: training.batches(3),
        lambda: choose_batches(3, training, torch.Generator()),
    ):
        with pytest.raises(ValueError, match="num_examples is 3; allowed with drop_last: batch_s"):
            refused()


def test_images_in_no_step_are_left_to_the_prior() -> None:
    """A client that reports all images it holds, of which a pass leaves out two."""
    training = LocalTraining(
        "sgd", lr=0.05, batch_size=4, local_steps=0, local_epochs=1, drop_last=True
    )
    observation, knowledge, x = client(training, architecture="mlp")
    x = x.requires_grad_()
    objective = matching_objective("auto", observation, knowledge)
    assert objective(x, 0.0).item() == pytest.approx(0, abs=1e-5)
    objective(x + 0.1, 0.0).backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).norm(dim=1) > 0).tolist() == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="num_examples is 6; allowed: at most the 4"):
        infer_labels("auto", observation, knowledge)


@pytest.mark.parametrize(
    ("name", "others", "method"),
    [
        ("label smoothing", {}, "simulate"),
        ("rmsprop", {}, "simulate"),
        ("schedule", {}, "simulate"),
        ("trainable", {}, "simulate"),
        ("maximize", {"local_steps": 1}, "dlf"),
        ("mse", {}, "fitted"),
        ("proximal", {}, "fitted"),
        ("groups", {}, "fitted"),
    ],
)
def test_labels_are_inferred_or_fitted(
    name: str, others: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "_RESTARTS", 1)
    monkeypatch.setattr(labels_module, "_SWEEPS", 3)
    training = training_of(name, **({"batch_size": 2, "local_steps": 3} | others))
    count = len({i for batch in training.batches(6) for i in batch})
    observation, knowledge, _ = client(training, architecture="mlp", count=count)
    found = infer(observation, knowledge.granting("unknown"))
    assert found.labels_source == method
    if method == "fitted":
        return
    right = torch.tensor(knowledge.labels).bincount(minlength=10)
    counts = torch.tensor(found.labels).bincount(minlength=10)
    assert int((right - counts).abs().sum()) <= 2  # one image in six


def test_every_pass_has_candidates_of_its_own() -> None:
    training = training_of("dampening", local_steps=0, local_epochs=2, batch_size=4, drop_last=True)
    observation, knowledge, x = client(training, architecture="mlp", count=8)
    objective = objective_of(Passes, observation, knowledge)
    others = torch.cat([x, torch.zeros_like(x)])
    assert objective(torch.cat([x, x]), 1.0).item() == pytest.approx(0, abs=1e-5)
    assert objective(others, 1.0).item() > 1e-3


@pytest.mark.parametrize("attack", [FlowMatching(flow=0.0), InvertingGradients(matching="auto")])
@pytest.mark.parametrize("name", ["rmsprop", "label smoothing"])
def test_attacks_run_with_their_defaults(attack: Attack, name: str) -> None:
    observation, knowledge, x = client(training_of(name), architecture="mlp")
    found = attack(observation, knowledge, budget=Budget(iterations=3))
    assert found.matching.startswith("trajectory: auto, 5 steps of")
    assert found.losses[-1] < found.losses[0]
    objective = matching_objective("auto", observation, knowledge)
    assert objective(x, 1.0).item() < (0.02 if name == "rmsprop" else 1e-5)  # it is smoothed
    assert objective(torch.zeros_like(x), 1.0).item() > 0.1


def test_the_client_trains_as_a_textbook_says() -> None:
    """Torch's own scheduler, groups and losses, and FedProx's term in the loss."""
    training = training_of("groups, rmsprop", local_steps=5, accumulate=2, max_grad_norm=1.0)
    observation, knowledge, x = client(training, torch.float64, architecture="mlp")
    model = create_model("mlp", 10, SHAPE, seed=1).double()
    named = dict(model.named_parameters())
    named["fc1.weight"].requires_grad_(False)
    biases = [w for name, w in named.items() if name.endswith("bias")]
    groups = [{"params": biases, "lr": 0.02}, {"params": [named["classifier.weight"]]}]
    optimizer = torch.optim.RMSprop(groups, lr=training.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 if step else 1.0)
    labels = torch.tensor(knowledge.labels)
    batches = training.batches(6)
    for number, batch in enumerate(batches, start=1):
        loss = F.cross_entropy(model(x[list(batch)]), labels[list(batch)], label_smoothing=0.1)
        for name, w in named.items():
            loss = loss + 0.1 / 2 * (w - observation.w0[name]).square().sum()
        (loss / 2).backward()
        if number in (2, 4, len(batches)):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    for name, w in named.items():
        assert (w - observation.w1[name]).abs().max() < 1e-12, name

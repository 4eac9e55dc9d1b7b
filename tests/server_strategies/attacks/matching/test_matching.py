"""Matching objectives: against the real client's training and known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.clients import CLIENTS, SHAPE, client
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fl_app.models import create_model
from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching import matching_objective, simulation
from server_strategies.attacks.matching.distance import DISTANCES, CosineDistance, dense
from server_strategies.attacks.matching.outer_products import OuterSum, cheaper_as_sums
from server_strategies.attacks.matching.simulation import displacement, simulate
from server_strategies.attacks.matching.surrogate import mean_position


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_simulation_is_the_clients_own_training(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    observation, knowledge, x = client(CLIENTS[name], dtype)
    labels = torch.tensor(knowledge.labels)
    batches = [(x[list(b)], labels[list(b)]) for b in CLIENTS[name].batches(6)]
    model = create_model("convnet", 10, SHAPE).to(dtype)
    found = simulate(model, dict(observation.w0), batches, CLIENTS[name])
    for key, expected in observation.w1.items():
        assert (found[key] - expected).norm() <= bound * expected.norm(), key


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize(
    "graphs", [5, 2, 0]
)  # kept; the others are computed again in the backward pass
def test_the_adjoint_is_autograds_gradient(
    name: str, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(CLIENTS[name], local_steps=5)
    observation, knowledge, x = client(training, torch.float64)
    labels = torch.tensor(knowledge.labels)
    model = create_model("convnet", 10, SHAPE).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    adjoint = {
        k: torch.randn(w.shape, generator=generator).to(w) for k, w in observation.w0.items()
    }

    def gradient(simulation: Callable[..., dict[str, Tensor]]) -> Tensor:
        start = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        start.requires_grad_()
        batches = [(start[list(b)], labels[list(b)]) for b in training.batches(6)]
        weights = simulation(model, dict(observation.w0), batches, training, 0.3)
        sum((adjoint[k] * w).sum() for k, w in weights.items()).backward()
        assert start.grad is not None
        return start.grad

    computed: list[int] = []
    original = simulation._Steps.differentiable

    def counted(self: simulation._Steps, *arguments: Any) -> list[Tensor]:
        computed.append(self.graph_bytes)
        return original(self, *arguments)

    monkeypatch.setattr(simulation._Steps, "differentiable", counted)
    gradient(simulate)
    assert len(computed) == 5 and computed[-1] > sum(w.nbytes for w in adjoint.values())
    # Half a graph more: the measured size varies with the addresses of memory.
    monkeypatch.setattr(simulation, "KEPT_GRAPHS", (graphs + 0.5) * computed[-1])
    expected = gradient(slow_simulation)
    computed.clear()
    assert (gradient(simulate) - expected).norm() <= 1e-10 * expected.norm()
    assert len(computed) == 5 + 5 - max(graphs, 1)  # the first is always kept: it is the measure


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "schedule": (1.0, 0.5)},
        {
            "accumulate": 2,
            "optimizer_options": {"dampening": 0.5, "maximize": True},
            "momentum": 0.9,
        },
        {"groups": [{"pattern": "fc1*", "lr": 0.1, "weight_decay": 0.2}], "label_smoothing": 0.1},
    ],
)
def test_weights_as_sums_are_those_that_are_formed(change: dict[str, Any]) -> None:
    training = replace(CLIENTS["sgd"], local_steps=5, **change)
    observation, knowledge, x = client(training, torch.float64)
    labels, w0 = torch.tensor(knowledge.labels), dict(observation.w0)
    model = create_model("convnet", 10, SHAPE).to(torch.float64)
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    start.requires_grad_()

    def batches() -> list[tuple[Tensor, Tensor]]:
        return [(start[list(b)], labels[list(b)]) for b in training.batches(6)]

    def slopes(pieces: list[Tensor | OuterSum]) -> list[Tensor]:
        seen = list(observation.update.values())
        distances = torch.stack([kind(seen)(pieces) for kind in DISTANCES.values()])
        uneven = torch.arange(1.0, 1 + len(distances)).to(x)
        return [distances, *torch.autograd.grad(distances, start, uneven)]

    weights = simulate(model, w0, batches(), training)
    sums = ("fc1.weight", "classifier.weight")
    pieces = displacement(model, w0, batches(), training, sums=sums)
    assert any(isinstance(piece, OuterSum) for piece in pieces) != bool(training.weight_decay)
    plain = [weights[name] - w for name, w in w0.items()]
    for expected, found in zip(
        [*plain, *slopes(plain)], [*dense(pieces), *slopes(pieces)], strict=True
    ):
        assert (found - expected).norm() <= 1e-9 * expected.norm()


def test_only_weights_that_linear_layers_alone_read_are_sums() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = create_model("convnet", 10, SHAPE)

        def forward(self, x: Tensor) -> Tensor:
            scale: Tensor = self.inner.fc1.weight.square().sum()
            logits: Tensor = self.inner(x)
            return scale * logits

    training = CLIENTS["sgd"]
    _, knowledge, x = client(training)
    batch = (x[:2], torch.tensor(knowledge.labels)[:2])
    for model, change, images, expected in (
        (create_model("convnet", 10, SHAPE), {}, 6, ("fc1.weight",)),
        (create_model("convnet", 10, SHAPE), {}, 2000, ()),  # more rows than it is large
        (create_model("convnet", 10, SHAPE), {"max_grad_norm": 1.0}, 6, ()),
        (create_model("convnet", 10, SHAPE), {"trainable": ("conv*",)}, 6, ()),
        (Twice(), {}, 6, ()),
    ):
        w0 = dict(model.named_parameters())
        assert cheaper_as_sums(model, w0, batch, replace(training, **change), images) == expected


def slow_simulation(
    model: nn.Module,
    w0: dict[str, Tensor],
    batches: list[tuple[Tensor, Tensor]],
    training: LocalTraining,
    smoothing: float,
) -> dict[str, Tensor]:
    """The textbook's loop, with one autograd graph over all of it."""
    w = {k: value.clone().requires_grad_() for k, value in w0.items()}
    m, v = ({k: torch.zeros_like(value) for k, value in w0.items()} for _ in range(2))
    for step, (x, y) in enumerate(batches, start=1):
        loss = F.cross_entropy(functional_call(model, w, (x,)), y)
        parts = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        g = dict(zip(w, parts, strict=True))
        if training.max_grad_norm:
            length = torch.cat([part.flatten() for part in g.values()]).norm()
            if length > training.max_grad_norm:
                g = {k: training.max_grad_norm / (length + 1e-6) * part for k, part in g.items()}
        for k in w:
            if training.optimizer == "adamw":
                w[k] = w[k] - training.lr * training.weight_decay * w[k]
            else:
                g[k] = g[k] + training.weight_decay * w[k]
            if training.optimizer == "sgd":
                m[k] = training.momentum * m[k] + g[k]
                look = g[k] + training.momentum * m[k] if training.nesterov else m[k]
                w[k] = w[k] - training.lr * look
            else:
                # The smoothing's scale is a constant of the step, not differentiated.
                root = smoothing * g[k].detach().abs().mean()
                m[k] = 0.9 * m[k] + 0.1 * g[k]
                v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
                scale = (v[k] / (1 - 0.999**step) + root**2).sqrt() + 1e-8
                w[k] = w[k] - training.lr * m[k] / (1 - 0.9**step) / scale
    return w


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_coordinates_that_never_changed_have_a_finite_gradient(smoothing: float) -> None:
    observation, knowledge, _ = client(CLIENTS["adam"])
    x = torch.zeros((6, *SHAPE)).requires_grad_()  # no gradient reaches the first layer's weights
    labels = torch.tensor(knowledge.labels)
    batches = [(x[list(b)], labels[list(b)]) for b in CLIENTS["adam"].batches(6)]
    model = create_model("convnet", 10, SHAPE)
    weights = simulate(model, dict(observation.w0), batches, CLIENTS["adam"], smoothing)
    sum(w.square().sum() for w in weights.values()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_one_sgd_step_is_a_gradient() -> None:
    observation, knowledge, x = client(replace(CLIENTS["sgd"], batch_size=6, local_steps=1))
    surrogate = matching_objective("surrogate", observation, knowledge)
    with torch.no_grad():
        surrogate.alpha.zero_()  # alpha = 0: at w0
    assert surrogate(x, 0.0).item() == pytest.approx(0, abs=1e-5)
    # The sign fault of other attack code: w1 - w0 is not a gradient but its negative.
    flipped = replace(observation, w0=observation.w1, w1=observation.w0)
    backwards = matching_objective("surrogate", flipped, knowledge)
    with torch.no_grad():
        backwards.alpha.fill_(1)  # the same place, seen from the other end
    assert backwards(x, 0.0).item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_the_ground_truth_matches_better_than_other_images(name: str) -> None:
    observation, knowledge, x = client(CLIENTS[name])
    trajectory = matching_objective("auto", observation, knowledge)
    others = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert trajectory(x, 0.0).item() < 0.5 * trajectory(others, 0.0).item()
    if CLIENTS[name].optimizer == "sgd":
        assert trajectory(x, 0.0).item() == pytest.approx(0, abs=1e-5)


def test_auto_says_what_it_chose_and_why() -> None:
    one_step = {"batch_size": 6, "local_steps": 1}
    several = {"local_steps": 0, "local_epochs": 2}
    for name, change, chosen, why in (
        ("sgd", {}, "low_rank", "exact features of 6 of 6 images"),
        ("adam", {}, "trajectory", "3 steps of adam"),
        ("epochs", {}, "fingerprints", "later passes in the first's order"),
        ("momentum", several, "trajectory", "later passes in the first's order"),
        ("momentum", {**several, "reshuffle": False}, "trajectory", "in one order"),
        ("momentum", one_step, "low_rank", "exact features of 6 of 6 images"),
        ("adamw", one_step, "inversion", "rounding leaves the gradient's size"),
    ):
        observation, knowledge, _ = client(replace(CLIENTS[name], **change))
        objective = matching_objective("auto", observation, knowledge, seconds=3.0)
        assert (objective.name, why in objective.reason) == (chosen, True)
    noisy = {k: w + 1e-4 * torch.randn(w.shape) for k, w in observation.w1.items()}
    objective = matching_objective("auto", replace(observation, w1=noisy), knowledge, seconds=3.0)
    assert objective.name == "trajectory"
    assert "noise or coarse rounding" in objective.reason


def test_a_surrogate_starts_where_the_gradients_were_taken() -> None:
    sgd, momentum = CLIENTS["sgd"], CLIENTS["momentum"]
    assert mean_position(sgd, 1) == 0
    assert mean_position(sgd, 5) == pytest.approx(0.4)  # of 0, 1/5, 2/5, 3/5, 4/5
    # K=2: updates of 1, then 1.9; the gradients contribute 1.9 and 1.
    assert mean_position(momentum, 2) == pytest.approx((1.9 * 0 + 1 * 1) / 2.9**2)
    assert mean_position(CLIENTS["nesterov"], 2) == pytest.approx(1.9**2 / (1.9 + 2.71) ** 2)


def test_unknown_labels_are_fitted() -> None:
    observation, knowledge, x = client(replace(CLIENTS["sgd"], batch_size=6, local_steps=1))
    objective = matching_objective("gradient", observation, knowledge.granting("unknown"))
    (unknown,) = objective.unknowns
    optimizer = torch.optim.Adam([unknown.value], unknown.lr)
    for _ in range(60):
        objective(x, 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        unknown.value.data.clamp_(0, 1)
    found = zip(objective.found_labels(), knowledge.labels or (), strict=True)
    assert sum(a == b for a, b in found) >= 5  # of six, where chance is one


def test_wrong_labels_and_kinds_are_refused() -> None:
    observation, knowledge, _ = client(CLIENTS["sgd"])
    with pytest.raises(ValueError, match="3 labels for 6 examples"):
        matching_objective("auto", observation, replace(knowledge, labels=(1, 2, 3)))
    with pytest.raises(ValueError, match="allowed: auto, surrogate, trajectory"):
        matching_objective("magic", observation, knowledge)
    allowed = "allowed: auto, cosine, squared, layered"
    with pytest.raises(ValueError, match=f"distance is 'magic'; {allowed}"):
        matching_objective("auto", observation, knowledge, distance="magic")
    with pytest.raises(ValueError, match="the client's training is unknown"):
        matching_objective("auto", observation, replace(knowledge, training=None))


def test_cosine_distance_is_its_formula() -> None:
    seen = [torch.tensor([1.0, 0.0]), torch.tensor([[1.0]])]
    distance = CosineDistance(seen)
    assert distance(seen).item() == pytest.approx(0, abs=1e-6)
    assert distance([-3 * part for part in seen]).item() == pytest.approx(2)
    assert distance([torch.tensor([2.0, 0.0]), torch.tensor([[0.0]])]).item() == pytest.approx(
        1 - 0.5**0.5
    )
    with pytest.raises(ValueError, match="the update is zero"):
        CosineDistance([torch.zeros(2)])


def test_a_masked_cosine_ignores_what_is_masked() -> None:
    seen, mask = [torch.tensor([1.0, 5.0, 1.0])], [torch.tensor([True, False, True])]
    distance = CosineDistance(seen, mask)
    assert distance([torch.tensor([2.0, -9.0, 2.0])]).item() == pytest.approx(0, abs=1e-6)
    assert distance([torch.tensor([1.0, 5.0, 0.0])]).item() == pytest.approx(1 - 0.5**0.5)
    with pytest.raises(ValueError, match="zero"):
        CosineDistance(seen, [torch.tensor([False] * 3)])

"""Exact features of single images under Adam: made-up factors, and the updates of real clients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.clients import client
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.models import clients_model
from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.low_rank.adam_steps import (
    StepFactors,
    adam_update,
    step_factors,
)
from server_strategies.attacks.matching.low_rank.exact import ExactFeatures, exact_features
from server_strategies.attacks.matching.low_rank.objective import LowRank

ADAM = LocalTraining("adam", lr=1e-3, batch_size=1, local_steps=4)
STEPS = 3  # of made-up updates
ADAMW = replace(ADAM, optimizer="adamw", weight_decay=0.1)
Layer = tuple[Tensor, Tensor]


def torchs(training: LocalTraining, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's own optimiser."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    return kind(parameters, training.lr, weight_decay=training.weight_decay)


@pytest.mark.parametrize("training", [ADAM, ADAMW], ids=["adam", "adamw"])
def test_the_update_and_its_slopes_are_those_of_torch(training: LocalTraining) -> None:
    generator = torch.Generator().manual_seed(0)
    # From far below epsilon to far above, some of them zero.
    sizes = torch.logspace(-10, 0, 50, dtype=torch.float64)
    gradient = torch.randn(4, 50, generator=generator).double() * sizes
    gradient *= torch.rand(4, 50, generator=generator) < 0.7
    w = nn.Parameter(torch.randn(50, generator=generator).double())
    start, optimizer = w.detach().clone(), torchs(training, [w])
    for g in gradient:
        w.grad = g.clone()
        optimizer.step()
    decay = training.lr * training.weight_decay
    update, slopes = adam_update(gradient, decay)
    expected = (start * (1 - decay) ** 4 - w.detach()) / training.lr
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11)
    moved = (gradient != 0).any(0)  # the root's own slope is infinite at zero
    expected = torch.func.jacrev(lambda g: textbooks(g, decay))(gradient[:, moved])
    expected = expected.diagonal(dim1=0, dim2=2)  # a coordinate depends on its own gradients
    torch.testing.assert_close(slopes[:, moved], expected, rtol=1e-9, atol=0)


def textbooks(gradient: Tensor, decay: float) -> Tensor:
    """Return Adam's update of gradients (K, n) in units of lr, by closed sums of moments."""
    total = torch.zeros_like(gradient[0])
    for k in range(len(gradient)):
        past = range(k + 1)
        m = sum(0.1 * 0.9 ** (k - j) * gradient[j] for j in past) / (1 - 0.9 ** (k + 1))
        v = sum(0.001 * 0.999 ** (k - j) * gradient[j] ** 2 for j in past) / (1 - 0.999 ** (k + 1))
        # An epsilon far below the root's own, so that no root is taken at zero.
        step = m / ((v + 1e-60).sqrt() + 1e-8)
        total = total + (1 - decay) ** (len(gradient) - 1 - k) * step
    return total


def made_up(size: float) -> Layer:
    """Return slopes (STEPS, 60) and features (STEPS, 400) as behind and in front of ReLUs."""
    generator = torch.Generator().manual_seed(0)
    slopes = size * torch.randn(STEPS, 60, generator=generator)
    slopes *= torch.rand(STEPS, 60, generator=generator) < 0.5
    return slopes, torch.randn(STEPS, 400, generator=generator).clamp_min(0)


def trained(slopes: Tensor, features: Tensor, training: LocalTraining) -> tuple[Layer, Layer]:
    """Return a layer's weight and bias before and after steps of torch's optimiser."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.rand(60, 400, generator=generator).sub(0.5) / 10)
    bias = nn.Parameter(torch.rand(60, generator=generator).sub(0.5) / 10)
    w0 = weight.detach().clone(), bias.detach().clone()
    optimizer = torchs(training, [weight, bias])
    for slope, feature in zip(slopes, features, strict=True):
        weight.grad, bias.grad = torch.outer(slope, feature), slope.clone()
        optimizer.step()
    return w0, (weight.detach(), bias.detach())


def distances(found: StepFactors, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return by step how far the known features are from the true ones, and their factor."""
    known = found.spread.isfinite()
    ours, true = found.features * known, features.double() * known
    factor = true.norm(dim=1) / ours.norm(dim=1)
    return (ours * factor[:, None] - true).norm(dim=1) / true.norm(dim=1), factor


@pytest.mark.parametrize("training", [ADAM, ADAMW], ids=["adam", "adamw"])
# Of larger slopes epsilon hides more sizes; how many differs a little from CPU to CPU.
@pytest.mark.parametrize(("size", "share"), [(1e-4, 1.0), (3e-3, 0.9), (1e-2, 0.6)])
def test_factors_of_a_made_up_sum_are_found(
    training: LocalTraining, size: float, share: float
) -> None:
    slopes, features = made_up(size)
    found = step_factors(*trained(slopes, features, training), training, [1] * STEPS)
    assert found is not None
    assert torch.equal(found.features > 0, features > 0)
    assert torch.equal(found.slopes.sign(), slopes.sign().double())
    assert found.spread.isfinite().double().mean() >= share
    off, factor = distances(found, features)
    assert off.max() < (0.02 if share >= 0.9 else 0.05)
    # Where nearly all features are known, so is the slopes' size, up to what the features lack.
    if share > 0.9:
        ours = found.slopes / factor[:, None]
        assert ((ours - slopes).norm(dim=1) / slopes.norm(dim=1)).max() < 0.02
    torch.testing.assert_close(found.features.norm(dim=1), torch.ones(STEPS).double())


def test_updates_that_dont_show_their_steps_are_refused() -> None:
    slopes, features = made_up(1e-4)
    decayed = replace(ADAM, weight_decay=0.1)
    assert step_factors(*trained(slopes, features, decayed), decayed, [1] * STEPS) is None
    w0, (weight, bias) = trained(slopes, features, ADAM)
    assert step_factors(w0, (weight, bias), ADAM, [1] * STEPS) is not None
    generator = torch.Generator().manual_seed(2)
    noise = 1e-3 * ADAM.lr * torch.randn(weight.shape, generator=generator)
    assert step_factors(w0, (weight + noise, bias), ADAM, [1] * STEPS) is None


def test_the_images_of_a_batch_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    slopes = 1e-4 * torch.randn(6, 150, generator=generator)
    slopes *= torch.rand(6, 150, generator=generator) < 0.4
    features = torch.randn(6, 1200, generator=generator).sub(1.0).clamp_min(0)
    weight = nn.Parameter(torch.rand(150, 1200, generator=generator).sub(0.5) / 10)
    bias = nn.Parameter(torch.rand(150, generator=generator).sub(0.5) / 10)
    w0 = weight.detach().clone(), bias.detach().clone()
    optimizer = torchs(ADAM, [weight, bias])
    for step in range(3):
        here = slice(2 * step, 2 * step + 2)
        weight.grad = slopes[here].T @ features[here]
        bias.grad = slopes[here].sum(0)
        optimizer.step()
    found = step_factors(w0, (weight.detach(), bias.detach()), ADAM, [2] * 3)
    assert found is not None
    assert found.found.all()
    for step in range(3):
        here = slice(2 * step, 2 * step + 2)
        ours = F.normalize(found.slopes[here], dim=1)
        alike = ours @ F.normalize(slopes[here].double(), dim=1).T
        order = alike.argmax(1)
        assert sorted(order.tolist()) == [0, 1]
        assert alike.max(1).values.min() > 0.99
        known = found.spread[here].isfinite()
        assert known.double().mean() > 0.9
        true = features[here].double()[order] * known
        near = F.normalize(found.features[here] * known, dim=1) - F.normalize(true, dim=1)
        assert near.norm(dim=1).max() < 0.05


@pytest.mark.parametrize("training", [ADAM, ADAMW], ids=["adam", "adamw"])
def test_labels_and_loss_of_a_real_client(training: LocalTraining) -> None:
    observation, knowledge, x = client(training, count=4, smooth=True)
    blind = knowledge.granting("unknown")
    exact = exact_features(clients_model(blind, observation.w0), observation, blind)
    assert isinstance(exact, ExactFeatures)
    assert exact.found.all()
    assert exact.replay.labels == knowledge.labels
    objective = matching_objective("auto", observation, blind)
    assert isinstance(objective, LowRank)
    # The weights in front of the layer are those of the true images' own training.
    assert objective(x, 0.0) < 1e-4
    assert objective(x.flip(0), 0.0) > 1e-2

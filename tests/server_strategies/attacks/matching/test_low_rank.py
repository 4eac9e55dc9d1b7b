"""Exact features: made-up sums, and the updates of real clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.clients import CLIENTS, MEAN, STD, client
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.defenses import defended_weights, noise_generator
from fl_app.models import clients_model, create_model
from fl_app.protocol import Budget, Defense, Knowledge, LocalTraining, Observation
from server_strategies.attacks.flow_matching import FlowMatching
from server_strategies.attacks.gauss_newton import _joint_step, determined
from server_strategies.attacks.matching import choose, matching_objective
from server_strategies.attacks.matching.low_rank.exact import (
    ExactFeatures,
    exact_features,
    term_slopes,
)
from server_strategies.attacks.matching.low_rank.head import Head
from server_strategies.attacks.matching.low_rank.objective import LowRank
from server_strategies.attacks.matching.low_rank.sparse import separate_sparse
from server_strategies.attacks.matching.low_rank.spectrum import known_part, spectrum
from server_strategies.attacks.matching.low_rank.vertices import separate_bounded
from server_strategies.attacks.matching.relu_smoothing import smooth_relu, soft_gates

SGD = LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=3)
SGD_ALONE = LocalTraining("sgd", lr=0.01, batch_size=1, local_steps=5)
ADAM_ALONE = LocalTraining("adam", lr=1e-3, batch_size=1, local_steps=4)


def terms(count: int, alike: bool = False) -> tuple[Tensor, Tensor]:
    """Return slopes (count, 60) and features (count, 400) as behind and in front of ReLUs."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(count, 60, generator=generator).double()
    slopes *= torch.rand(count, 60, generator=generator) < 0.5
    before = torch.randn(count, 400, generator=generator).double() - 0.3
    if alike:  # the same image at another step's weights
        before[1] = before[0] + 0.1 * torch.randn(400, generator=generator).double()
    return slopes, before.clamp_min(0)


def layer_update(slopes: Tensor, features: Tensor, noise: float = 1e-9) -> tuple[Tensor, Tensor]:
    """Return the update of weight and bias that the terms sum up to, rounded."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = slopes.T @ features, slopes.sum(0)
    rounding = noise * torch.randn(*weight.shape, generator=generator).double()
    return weight + rounding, bias


@pytest.mark.parametrize(("count", "claimed"), [(1, 1), (5, 5), (12, 12), (5, 6)])
def test_the_terms_of_a_made_up_sum_are_found(count: int, claimed: int) -> None:
    slopes, features = terms(count)
    seen = spectrum(*layer_update(slopes, features), claimed)
    assert seen is not None
    assert seen.rank == count
    assert seen.gap > 1e3
    places = separate_bounded(seen, 0.0)
    found = torch.from_numpy(places @ seen.right.T)
    near = torch.cdist(features, found) / features.norm(dim=1, keepdim=True)
    assert len(found) == count
    assert near.min(1).values.max() < 1e-4
    # The bias's column gives the scale, so the slopes follow too.
    ours = torch.from_numpy(term_slopes(seen, places)[0].T)[near.argmin(1)]
    torch.testing.assert_close(ours, slopes, rtol=1e-3, atol=1e-4)


def test_two_terms_that_are_nearly_one_are_told_apart() -> None:
    slopes, features = terms(5, alike=True)
    seen = spectrum(*layer_update(slopes, features), 5)
    assert seen is not None
    found = torch.from_numpy(separate_bounded(seen, 0.0) @ seen.right.T)
    near = torch.cdist(features, found) / features.norm(dim=1, keepdim=True)
    assert near.min(1).values.max() < 1e-3


def test_images_whose_units_close_together_are_not_blended() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(10, 400, generator=generator).double()
    # What images have in common, such as a background, opens the same units in all of them.
    common = torch.rand(200, generator=generator) < 0.5
    own = torch.rand(10, 200, generator=generator) < 0.3
    slopes = torch.randn(10, 200, generator=generator).double() * (common ^ own)
    seen = spectrum(*layer_update(slopes, features), 10)
    assert seen is not None
    for seed in range(4):
        found = torch.from_numpy(separate_sparse(seen, seed) @ seen.right.T)
        near = torch.cdist(features, found) / features.norm(dim=1, keepdim=True)
        assert near.min(1).values.max() < 1e-4


def test_rounding_that_one_direction_has_more_of_is_no_term() -> None:
    slopes, features = terms(5)
    weight, bias = layer_update(slopes, features, noise=1e-7)
    # Alike inputs, such as a background, round alike: a direction of its own.
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(size, generator=generator).double() for size in (60, 400))
    unit = torch.outer(left / left.norm(), right / right.norm())
    noise = torch.linalg.matrix_norm(weight - slopes.T @ features, 2)
    assert spectrum(weight + 2 * noise * unit, bias, 5) is not None
    assert spectrum(weight + 20 * noise * unit, bias, 5) is None


def test_an_update_without_a_gap_is_refused() -> None:
    slopes, features = terms(12)
    # More terms than the client says, noise as large as the update, and more terms than rows.
    assert spectrum(*layer_update(slopes, features), 8) is None
    drowned = spectrum(*layer_update(slopes, features, noise=10.0), 12)
    assert drowned is None or drowned.rank < 6
    assert spectrum(*layer_update(slopes[:, :10], features), 12) is None


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_what_is_known_of_an_update_is_what_torch_makes_of_it(name: str) -> None:
    training = CLIENTS[name]
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [w], training.lr, training.momentum, 0.0, training.weight_decay, training.nesterov
    )
    gradients = (0.3, -1.0, 0.7)
    for gradient in gradients:
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    left, worth = known_part(training, 3)
    assert w.item() == pytest.approx(2 * left - np.dot(worth, gradients), rel=1e-12)


def test_the_head_has_the_models_own_gradient() -> None:
    model = create_model("lenet5", 10, (1, 28, 28), seed=0)
    weights = {name: w.detach() for name, w in model.named_parameters()}
    head = Head(model, weights, "fc1", (1, 28, 28))
    assert head.sealed
    assert head.names[0] == "fc1.weight"
    x, y = torch.randn(3, 1, 28, 28), torch.tensor([1, 0, 7])
    kept: list[Tensor] = []
    model.fc1.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    F.cross_entropy(model(x), y).backward()
    gradient, inwards, outwards = head.gradient(weights, kept[0].detach(), y)
    for name, parameter in model.named_parameters():
        if name in head.names:
            torch.testing.assert_close(gradient[name], parameter.grad)
    torch.testing.assert_close(outwards @ weights["fc1.weight"], inwards)
    slopes = head.slopes(weights, kept[0].detach())
    torch.testing.assert_close(slopes[torch.arange(3), y] / 3, outwards)


def _features(observation: Observation, x: Tensor) -> Tensor:
    """Return what images give the first linear layer at w0, by the model itself."""
    model = create_model("convnet", 10, tuple(x.shape[1:]))
    model.load_state_dict(dict(observation.w0))
    kept: list[Tensor] = []
    model.fc1.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(x)
    return kept[0]


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "clipped"])
def test_features_steps_and_labels_of_a_real_client_are_exact(name: str) -> None:
    training = replace(CLIENTS[name], lr=0.01)
    observation, knowledge, x = client(training)
    blind = knowledge.granting("unknown")
    exact = exact_features(clients_model(blind, observation.w0), observation, blind)
    assert isinstance(exact, ExactFeatures)
    assert exact.found.all()
    labels = knowledge.labels
    assert labels
    for step in range(3):  # within a step the order is lost
        two = slice(2 * step, 2 * step + 2)
        assert sorted(exact.replay.labels[two]) == sorted(labels[two])
    apart = torch.cdist(exact.features[:2], _features(observation, x[:2]))
    assert apart.min(1).values.max() < 1e-3 * exact.features[0].norm()


def test_a_clipped_update_shows_its_own_scale() -> None:
    observation, knowledge, _ = client(SGD)
    update = {name: w.double() for name, w in observation.update.items()}
    length = torch.cat([part.flatten() for part in update.values()]).norm().item()
    defense = Defense(clip=length / 3, clip_by="norm")
    w1 = {name: w + update[name].float() / 3 for name, w in observation.w0.items()}
    clipped = replace(observation, w1=w1)
    known = replace(knowledge.granting("unknown"), defense=defense)
    exact = exact_features(clients_model(known, clipped.w0), clipped, known)
    assert isinstance(exact, ExactFeatures)
    assert exact.scale == pytest.approx(1 / 3, rel=1e-3)
    assert sorted(exact.replay.labels) == sorted(knowledge.labels or ())


def test_auto_takes_exact_features_where_there_are_any() -> None:
    observation, knowledge, _ = client(SGD)
    objective = matching_objective("auto", observation, knowledge.granting("unknown"))
    assert isinstance(objective, LowRank)
    assert "exact features of 6 of 6 images" in objective.reason
    adam = client(CLIENTS["adam"])
    assert not isinstance(matching_objective("auto", *adam[:2]), LowRank)
    with pytest.raises(ValueError, match="don't show"):
        matching_objective("low_rank", *adam[:2])
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: w + 0.01 * torch.randn(w.shape, generator=generator)
        for name, w in observation.w1.items()
    }
    drowned = replace(observation, w1=noisy)
    assert not isinstance(matching_objective("auto", drowned, knowledge), LowRank)


def _defended(
    training: LocalTraining, defense: Defense, known: bool
) -> tuple[Observation, Knowledge, Tensor]:
    """Return a client that shows exact features but for its defence, which may be known."""
    observation, knowledge, x = client(training, count=training.local_steps, smooth=True)
    assert isinstance(matching_objective("auto", observation, knowledge), LowRank)
    noise = noise_generator(seed=0, partition=0, round_=1)
    sent = defended_weights(observation.w0, observation.w1, defense, noise)
    told = replace(knowledge, defense=defense if known else Defense())
    return replace(observation, w1=sent), told, x


NOISE = Defense(noise="gaussian", sigma=1.0, relative=True)
BF16, INT8 = Defense(quantize="bf16"), Defense(quantize="int8")


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(
    ("training", "defense"),
    [(SGD_ALONE, NOISE), (ADAM_ALONE, NOISE), (ADAM_ALONE, BF16), (ADAM_ALONE, INT8)],
    ids=["sgd-noise", "adam-noise", "adam-bf16", "adam-int8"],
)
def test_what_a_defence_hides_is_left_to_the_other_objectives(
    training: LocalTraining, defense: Defense, known: bool
) -> None:
    observation, knowledge, _ = _defended(training, defense, known)
    model = clients_model(knowledge, observation.w0)
    assert isinstance(exact_features(model, observation, knowledge), str)
    chosen, _ = choose(model, observation, knowledge)
    assert matching_objective("auto", observation, knowledge).name == chosen


@pytest.mark.parametrize(("defense", "bound"), [(BF16, 0.03), (INT8, 0.15)], ids=["bf16", "int8"])
def test_rounding_leaves_the_features_of_few_images(defense: Defense, bound: float) -> None:
    observation, knowledge, x = _defended(SGD_ALONE, defense, known=True)
    blind = knowledge.granting("unknown")
    # Five terms are far above the noise of rounding: what auto takes is there, and right. Their
    # order is not: the weights move less than they are rounded.
    exact = exact_features(clients_model(blind, observation.w0), observation, blind)
    assert isinstance(exact, ExactFeatures) and exact.found.all()
    assert sorted(exact.replay.labels) == sorted(knowledge.labels or ())
    true = _features(observation, x)
    apart = torch.cdist(true, exact.features) / true.norm(dim=1, keepdim=True)
    assert apart.min(1).values.max() < bound


def test_the_loss_is_zero_at_the_ground_truth() -> None:
    observation, knowledge, x = client(replace(SGD, batch_size=1, local_steps=6))
    objective = matching_objective("low_rank", observation, knowledge)
    # The weights in front of the layer are those of the true images' own training.
    assert objective(x, 0.0) < 1e-7
    assert objective(x.flip(0), 0.0) > 1e-2


@pytest.mark.parametrize("architecture", ["convnet", "mlp"])
def test_images_are_decoded_from_their_features(architecture: str) -> None:
    observation, knowledge, x = client(SGD, architecture=architecture, smooth=True)
    blind = knowledge.granting("unknown")
    found = FlowMatching(matching="low_rank", flow=0.0)(
        observation, blind, budget=Budget(iterations=30)
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    errors = torch.cdist((x * std + mean).flatten(1), found.images.flatten(1)).square() / 192
    assert (-10 * errors.min(1).values.log10()).min() > 30
    assert sorted(found.labels) == sorted(knowledge.labels or ())
    assert found.labels_source == "replay"
    assert len(found.determined) == len(x)
    if architecture == "mlp":  # its features are the pixels
        assert all(share and share > 0.99 for share in found.determined)


class HalfSeen(LowRank):
    """Features that are half of an image's numbers, and of the second image none."""

    def __init__(self) -> None:
        self.found = torch.tensor([True, False])

    def groups(self) -> list[tuple[int, Tensor]]:
        return [(0, torch.tensor([0]))]

    def features(self, step: int, images: Tensor, x: Tensor) -> Tensor:
        return x.flatten(1)[:, ::2]

    def wanted(self, step: int, images: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        return given, torch.ones_like(given)


def test_features_of_half_the_numbers_determine_half_of_an_image() -> None:
    share, unknown = determined(HalfSeen(), torch.ones(2, 3, 4, 4))
    assert share == pytest.approx(0.5, abs=1e-3)
    assert unknown is None


def test_soft_gates_change_the_derivative_alone() -> None:
    z = torch.tensor([[-1.0, -0.01, 0.02, 3.0]], requires_grad=True)
    with soft_gates(0.1):
        value = F.relu(z)
    assert torch.equal(value, z.detach().clamp_min(0))
    (slope,) = torch.autograd.grad(value.sum(), z)
    scale = 0.1 * z.detach().square().mean().sqrt()
    torch.testing.assert_close(slope, torch.sigmoid(z.detach() / scale))


def test_soft_gates_go_before_the_surrogate_of_second_derivatives() -> None:
    z = torch.tensor([[-0.01, 3.0]], requires_grad=True)
    model = nn.Sequential(nn.ReLU())
    smooth_relu(model, 16.0)
    with soft_gates(0.1):
        (soft,) = torch.autograd.grad(model(z).sum(), z)
    (hard,) = torch.autograd.grad(model(z).sum(), z)
    assert 0.4 < soft[0, 0] < 0.5
    assert hard[0, 0] == 0


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "clipped"])
def test_the_last_convolutions_update_follows_from_the_images(name: str) -> None:
    training = replace(CLIENTS[name], lr=0.01, batch_size=1, local_steps=6)
    observation, knowledge, x = client(training)
    objective = matching_objective("low_rank", observation, knowledge)
    assert isinstance(objective, LowRank)
    equations = objective.convolution
    assert equations is not None
    objective.renew(x)
    runs = [objective.reached(step, x[step : step + 1]) for step in range(6)]
    inputs, outputs = (
        torch.cat(each) for each in zip(*((r.inputs, r.outputs) for r in runs), strict=True)
    )
    # With the gates that the images have, it is exact; unsure ones change what P leaves out.
    left = equations.update - equations.along(inputs, equations.slopes * (outputs > 0))
    assert left.norm() < 1e-3 * equations.update.norm()
    gates = equations.gates(outputs, torch.zeros(6))
    slopes = equations.slopes * gates
    residual = equations.update - equations.along(inputs, slopes)
    weighted = equations.across(inputs, gates)(residual)
    assert (residual * weighted).sum() < 0.1 * residual.square().sum()
    v, u = torch.randn_like(inputs), torch.randn_like(residual)
    there, back = equations.along(v, slopes) * u, v * equations.back(u, slopes, v.shape)
    torch.testing.assert_close(there.sum(), back.sum(), rtol=1e-3, atol=1e-4)


def test_joint_steps_lead_to_the_images() -> None:
    observation, knowledge, x = client(replace(SGD, batch_size=1, local_steps=6), smooth=True)
    objective = matching_objective("low_rank", observation, knowledge)
    assert isinstance(objective, LowRank)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    start = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found, residuals = start, []
    for _ in range(5):
        objective.renew(found)
        box = (-mean / std, (1 - mean) / std)
        found, _, residual = _joint_step(objective, found, found, 1e-7, box)
        residuals.append(residual)
    assert residuals[-1] < 0.3 * residuals[0]
    assert (found - x).norm() < 0.2 * (start - x).norm()


def test_without_a_convolution_in_front_there_are_no_equations() -> None:
    observation, knowledge, _ = client(SGD, architecture="mlp")
    objective = matching_objective("low_rank", observation, knowledge)
    assert isinstance(objective, LowRank)
    assert objective.convolution is None

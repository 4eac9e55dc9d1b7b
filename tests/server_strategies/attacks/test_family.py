"""The published attacks: each on a real client, and their parts against slow, obvious code."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from helpers.clients import MEAN, SHAPE, STD, client
from torch import Tensor
from torch.nn import functional as F

from fl_app.config import AttackConfig, PriorConfig
from fl_app.models import create_model
from fl_app.protocol import Budget, Knowledge, LocalTraining, Observation, Reconstruction
from server_strategies.attacks.evolve import evolve
from server_strategies.attacks.gradinversion import GradInversion
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.base import MatchingObjective, Setting
from server_strategies.attacks.matching.distance import DISTANCES
from server_strategies.attacks.matching.gradient_match import GradientMatch
from server_strategies.attacks.matching.passes import Passes
from server_strategies.attacks.matching.restarts import Restarts
from server_strategies.attacks.matching.trajectory import Trajectory
from server_strategies.attacks.optimise import Parts
from server_strategies.attacks.run import run_attack
from server_strategies.attacks.sme import SME
from server_strategies.priors.group import GroupConsistency, register
from server_strategies.priors.order_invariance import OrderInvariance
from server_strategies.priors.squared_norm import SquaredNorm
from server_strategies.priors.total_variation import TotalVariation

SGD = LocalTraining("sgd", lr=0.05, batch_size=1, local_steps=1)
ADAM = LocalTraining("adam", lr=1e-3, batch_size=1, local_steps=1)
# Four passes over two images.
EPOCHS = LocalTraining("sgd", lr=0.05, batch_size=1, local_steps=0, local_epochs=4)


def attack(
    name: str, iterations: int, seen: tuple[Observation, Knowledge, Tensor], **options: object
) -> Reconstruction:
    config = AttackConfig(name, iterations, options=options)
    return run_attack(seen[0], seen[1], config, PriorConfig(), seed=0)


def error(found: Reconstruction, x: Tensor) -> float:
    """Return the squared error of images as a share of that of the mean colour."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    truth = x * std + mean
    return float((found.images - truth).square().mean() / (truth - mean).square().mean())


@pytest.mark.parametrize(
    ("name", "iterations", "options"),
    [
        ("inverting_gradients", 80, {"lr": 0.2, "tv": 0.01}),
        ("dlf", 80, {}),
        ("gradinversion", 80, {"restarts": 2}),
        ("dlg", 200, {}),
        ("idlg", 200, {}),
    ],
)
@pytest.mark.parametrize("training", [SGD, ADAM], ids=["sgd", "adam"])
def test_an_image_is_recovered(
    name: str, iterations: int, options: dict[str, object], training: LocalTraining
) -> None:
    seen = client(training, count=1, smooth=True)
    if training is ADAM:
        options = {**options, "matching": "auto"}
    found = attack(name, iterations, seen, **options)
    assert error(found, seen[2]) < 0.7
    assert found.labels == seen[1].labels


def test_ggl_searches_a_latent_whose_image_matches_the_update() -> None:
    seen = client(SGD, count=1)
    found = attack("ggl", 30, seen, kl=0.0)
    assert found.losses[-1] < 0.8 * found.losses[0]
    shrunk = attack("ggl", 30, seen, kl=1e6)
    assert shrunk.losses[-1] > found.losses[-1]
    with pytest.raises(ValueError, match=r"steps is 0; allowed: a whole number, 1 or more"):
        attack("ggl", 1, seen, steps=0)


def test_ggl_searches_its_latent_where_an_image_is_known_in_closed_form() -> None:
    seen = client(SGD, count=1, architecture="mlp")
    assert matching_objective("gradient", *seen[:2]).start is not None
    found = attack("ggl", 30, seen, kl=0.0)
    assert found.losses[-1] < 0.9 * found.losses[0]


def test_ggl_searches_its_latent_without_gradients_too() -> None:
    seen = client(SGD, count=1)
    found, again = (attack("ggl", 6, seen, search="cma", population=8) for _ in range(2))
    assert torch.equal(found.images, again.images)
    assert found.iterations == 6 and found.flops > 0
    with pytest.raises(ValueError, match="search is 'grid'; allowed: adam, cma"):
        attack("ggl", 1, seen, search="grid")
    with pytest.raises(ValueError, match="population is 1; allowed: a whole number, 2 or more"):
        attack("ggl", 1, seen, search="cma", population=1)
    unknown = matching_objective(
        "gradient", seen[0], seen[1].granting("unknown"), distance="squared"
    )
    with pytest.raises(ValueError, match="can't fit what gradient leaves open"):
        evolve(Parts(unknown, decode=lambda z: z, population=2), seen[0], Budget(1))


@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_given_labels_are_not_read(name: str) -> None:
    observation, knowledge, x = client(SGD, count=1)
    assert knowledge.labels is not None
    lying = replace(knowledge, labels=((knowledge.labels[0] + 1) % 10,))
    honest, misled = (attack(name, 2, (observation, known, x)) for known in (knowledge, lying))
    assert torch.equal(honest.images, misled.images)
    assert honest.labels_source == ("fitted" if name == "dlg" else "idlg")


def test_dlg_fits_the_labels_of_a_batch_jointly_with_its_images() -> None:
    observation, knowledge, _ = client(replace(SGD, batch_size=2), count=2)
    found = attack("dlg", 20, (observation, knowledge, torch.zeros(0)))
    assert len(found.labels) == 2
    assert found.losses[-1] < found.losses[0]


class Known(MatchingObjective):
    """Its loss is its own number, and says nothing of the images."""

    name = "known"

    def __init__(self, seen: tuple[Observation, Knowledge, Tensor], loss: float) -> None:
        super().__init__(Setting(create_model("convnet", 10, SHAPE), seen[0], seen[1], ""))
        self.loss = loss

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        return self.loss + 0 * x.sum()


class Sphere(Known):
    """Its loss is the squared distance from one image."""

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        return (x - 0.5).square().mean()


def test_evolution_finds_the_least_of_a_sphere_and_returns_the_best_candidate() -> None:
    seen = client(SGD, count=1)
    sphere = Sphere(seen, 0.0)
    parts = Parts(sphere, decode=lambda z: 0.3 * z, population=20)
    found = evolve(parts, seen[0], Budget(150))
    assert found.losses[0] > 0.3  # 0.09 of z ~ N(0, I), 0.25 of its mean
    assert min(found.losses) < 0.15
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    loss = sphere((found.images - mean) / std, 1.0).item()
    assert loss == pytest.approx(min(found.losses), rel=1e-4)


def test_the_best_restart_is_the_one_of_least_loss() -> None:
    seen = client(SGD, count=2)
    losses = iter([0.3, 0.1, 0.2])
    restarts = Restarts([Known(seen, next(losses)) for _ in range(3)])
    # The first restart holds the ground truth; the second has the least loss.
    x = torch.cat([seen[2], seen[2] + 1, seen[2] + 2])
    assert restarts(x, 0.0).item() == pytest.approx(0.2)
    assert torch.equal(restarts.found_images(x), seen[2] + 1)
    with pytest.raises(ValueError, match="restarts is 0; allowed: a whole number, 1 or more"):
        GradInversion(restarts=0)


def test_gradinversion_returns_its_restart_of_least_loss() -> None:
    seen = client(SGD, count=2)
    kept: list[tuple[Tensor, Tensor]] = []
    usual = Restarts.found_images

    def spy(self: Restarts, x: Tensor) -> Tensor:
        kept.append((x.clone(), self.losses))
        return usual(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restarts, "found_images", spy)
        found = attack("gradinversion", 12, seen, restarts=3)
    ((candidates, losses),) = kept
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    best = candidates.view(3, 2, *SHAPE)[losses.argmin()] * std + mean
    assert torch.allclose(found.images, best.clamp(0, 1))
    assert losses.unique().numel() == 3


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (SGD, "squared"),
        (replace(SGD, local_steps=2, momentum=0.9), "squared"),
        (ADAM, "cosine"),
        (replace(ADAM, local_steps=2), "cosine"),
    ],
)
def test_sgd_is_matched_with_its_length(training: LocalTraining, expected: str) -> None:
    observation, knowledge, _ = client(training, count=training.local_steps)
    objective = matching_objective("auto", observation, knowledge, distance="auto")
    assert isinstance(objective, Trajectory | GradientMatch)
    assert type(objective.distance) is DISTANCES[expected]
    assert ("squared" in objective.reason) == (expected == "squared")
    # The surrogate has a distance of its own, which `auto` leaves it.
    own = matching_objective("surrogate", observation, knowledge, distance="auto")
    assert own.measure is DISTANCES["cosine"] and "squared" not in own.reason


def test_distances_are_their_formulas() -> None:
    b = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])]
    a = [torch.tensor([3.0, 1.0]), torch.tensor([4.0, 2.0])]
    expected_by_name = {
        "cosine": 1 - (9 + 4 + 0 + 4) / (math.sqrt(9 + 1 + 16 + 4) * math.sqrt(25 + 4)),
        "squared": (9 + 16) / (25 + 4),
        "layered": (3 + 4) / (5 + 2),
        "decaying": (9 + 16 / math.e) / (25 + 4 / math.e),
        "even": (9 / 25 + 16 / 4) / 2,
    }
    assert DISTANCES.keys() == expected_by_name.keys()
    masks = [torch.tensor([True, False]), torch.tensor([True, True])]
    for name, kind in DISTANCES.items():
        assert kind(b)(a).item() == pytest.approx(expected_by_name[name], rel=1e-5, abs=1e-6), name
        assert kind(b)(b).item() == pytest.approx(0, abs=1e-6), name
        blind = [a[0] * masks[0], a[1]], [b[0] * masks[0], b[1]]
        assert kind(b, masks)(a).item() == pytest.approx(kind(blind[1])(blind[0]).item()), name
        with pytest.raises(ValueError, match="the update is zero"):
            kind([torch.zeros(2)])
    # Rounding where there is no gradient in exact arithmetic does not drown the rest.
    rounding = [torch.tensor([1e-8, -1e-8])]
    assert DISTANCES["even"](b + rounding)([*b, -rounding[0]]).item() < 1e-6


def test_a_distance_of_its_own_is_not_replaced() -> None:
    observation, knowledge, _ = client(SGD, count=1)
    with pytest.raises(ValueError, match="matching is 'sign'; allowed: auto, trajectory"):
        matching_objective("sign", observation, knowledge, distance="squared")


def test_auto_compares_a_smoothed_adam_by_the_cosine() -> None:
    # With weight decay inside the gradient no features show, and the steps are simulated.
    training = replace(ADAM, local_steps=2, weight_decay=0.01)
    observation, knowledge, x = client(training, count=2)
    auto = matching_objective("auto", observation, knowledge, distance="squared")
    assert isinstance(auto, Trajectory) and isinstance(auto.distance, DISTANCES["cosine"])
    assert "by the cosine, as Adam is smoothed" in auto.reason
    # The smoothed steps are shorter: at the truth a distance that sees lengths is not small.
    squared = matching_objective("trajectory", observation, knowledge, distance="squared")
    assert auto(x, 0.0).item() < 0.5 * squared(x, 0.0).item()
    observation, knowledge, _ = client(replace(SGD, local_steps=2), count=2)
    exact = matching_objective("auto", observation, knowledge, distance="squared")
    assert isinstance(exact, Trajectory) and isinstance(exact.distance, DISTANCES["squared"])
    with pytest.raises(ValueError, match="distance is 'l1'; allowed: auto, cosine, squared"):
        matching_objective("auto", observation, knowledge, distance="l1")


def test_the_time_of_an_attack_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ticks = client(SGD, count=1), iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    whole = attack("sme", 1, seen)
    alone = SME()(*seen[:2], budget=Budget(1))
    assert whole.seconds == alone.seconds + 2  # a look at the clock before, and one after


def test_priors_are_their_formulas() -> None:
    images = torch.rand((4, 3, 5, 6), generator=torch.Generator().manual_seed(0))
    x = (images - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    norm = 0.5 * float(x.square().mean())
    assert SquaredNorm(0.5, MEAN, STD)(images, 0).item() == pytest.approx(norm)
    across = [float((x[n, c, i, j + 1] - x[n, c, i, j]) ** 2)
              for n in range(4) for c in range(3) for i in range(5) for j in range(5)]  # fmt: skip
    down = [float((x[n, c, i + 1, j] - x[n, c, i, j]) ** 2)
            for n in range(4) for c in range(3) for i in range(4) for j in range(6)]  # fmt: skip
    squared = (sum(across) / len(across) + sum(down) / len(down)) / 2
    found = TotalVariation(1.0, STD, power=2)(images, 0).item()
    assert found == pytest.approx(squared, rel=1e-5)
    group = GroupConsistency(2.0, restarts=2)(images, 0.1).item()
    apart = (images[:2] - images[2:]).square().mean() / 4  # each is half as far from the mean
    assert group == pytest.approx(2 * float(apart), rel=1e-5)


def test_the_consensus_is_of_registered_images() -> None:
    image = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    group = torch.stack([image, image.roll((2, -3), (2, 3))])
    assert torch.equal(register(group, image), torch.stack([image, image]))
    consistency = GroupConsistency(1.0, restarts=2)
    assert consistency(torch.cat([image, image]), 0.9).item() == pytest.approx(0)
    # Restarts that a few pixels separate: to the mean, as they do not know the image.
    smooth = F.avg_pool2d(F.pad(image, (2,) * 4, "circular"), 5, 1)
    shifts = [(0, 0), (0, 0), (0, 0), (1, -2), (-2, 1)]
    group = torch.stack([smooth.roll(shift, (2, 3)) for shift in shifts])
    assert torch.equal(register(group, group.mean(0)), smooth.expand_as(group))
    apart = GroupConsistency(1.0, restarts=5)
    first, second = (apart(group.flatten(0, 1), progress).item() for progress in (0.4, 0.9))
    assert first == pytest.approx(float((group - group.mean(0)).square().mean()), rel=1e-4)
    assert second == pytest.approx(float((group - smooth).square().mean()), rel=1e-4)


def test_the_order_of_a_pass_does_not_matter_but_its_images_do() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand((3, *SHAPE), generator=draw)
    prior = OrderInvariance(1.0, passes=2, count=3, generator=draw)
    assert prior(torch.cat([images, images.flip(0)]), 0).item() == pytest.approx(0, abs=1e-9)
    assert prior(torch.cat([images, 1 - images]), 0).item() > 1e-4
    assert OrderInvariance(1.0, 1, 3, draw)(images, 0).item() == 0


def test_every_pass_has_images_of_its_own_and_they_are_averaged_in_the_end() -> None:
    observation, knowledge, x = client(EPOCHS, count=2)
    passes = matching_objective("passes", observation, knowledge)
    assert isinstance(passes, Passes)
    assert (passes.candidates, passes.complete) == (4, 4)
    alike = x.repeat(4, 1, 1, 1)
    assert passes(alike, 0.0).item() == pytest.approx(0, abs=1e-5)  # SGD is simulated exactly
    alike[5] += 1
    assert passes(alike, 0.0).item() > 1e-5
    shuffled = torch.cat([x, x.flip(0) + 1, x, x.flip(0) - 1])
    assert torch.allclose(passes.found_images(shuffled), x, atol=1e-6)


def test_a_last_pass_may_take_some_images_only() -> None:
    observation, knowledge, x = client(replace(EPOCHS, local_steps=3), count=2)
    passes = matching_objective("passes", observation, knowledge)
    assert isinstance(passes, Passes)
    assert (passes.candidates, passes.complete) == (2, 1)
    # The second image of the second pass was never taken: it must not count.
    found = passes.found_images(torch.cat([x, x[1:] + 1, x[:1] + 99]))
    assert torch.allclose(found, x + torch.tensor([0, 0.5]).view(-1, 1, 1, 1), atol=1e-5)

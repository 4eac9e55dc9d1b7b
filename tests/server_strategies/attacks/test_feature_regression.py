"""The regression on real clients, small: what it reads, what it expects, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from client_app.training import train
from fl_app.config import AttackConfig, PriorConfig
from fl_app.models import clients_model, known_model
from fl_app.protocol import Defense, Knowledge, LocalTraining, Observation
from server_strategies.attacks.feature_regression import FeatureRegression
from server_strategies.attacks.matching.base import Setting
from server_strategies.attacks.matching.batch_norm import batch_statistics
from server_strategies.attacks.matching.gradient import loss_gradient
from server_strategies.attacks.regression.objective import Regression
from server_strategies.attacks.regression.probe import Probe
from server_strategies.attacks.run import run_attack
from server_strategies.priors.bank import load_bank

SHAPE, MEAN, STD = (3, 16, 16), (0.47, 0.44, 0.39), (0.22, 0.22, 0.22)
SGD = LocalTraining("sgd", lr=0.01, batch_size=1, local_steps=1)


def client(
    training: LocalTraining, count: int = 1, head: str = ""
) -> tuple[Observation, Knowledge, Tensor]:
    """Train ResNet-8 on images of the bank's end, which the regression does not see."""
    images = load_bank(SHAPE)[-count:]
    labels = tuple(range(3, 3 + count))
    known = Knowledge("resnet8", 10, SHAPE, MEAN, STD, training, head=head)
    known = known.granting("by-step", labels)
    model = known_model(known, seed=1)
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.tensor(batch) for batch in training.batches(count)]
    train(model, images, torch.tensor(labels), batches, training, MEAN, STD)
    return Observation(w0, model.state_dict(), count, round=1, node=1, client=1), known, images


def regression(seen: Observation, known: Knowledge, most: int = 200) -> Regression:
    setting = Setting(clients_model(known, seen.w0), seen, known, "asked for")
    return Regression(setting, load_bank(SHAPE), most)


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_all_groups_at_once_answer_as_each_alone(batch_norm: str) -> None:
    training = replace(SGD, batch_norm=batch_norm)
    _, known, _ = client(training)
    model = clients_model(known, known_model(known, seed=1).state_dict())
    weights = dict(model.named_parameters())
    x = torch.randn(3, 1, *SHAPE)
    found = Probe(model, weights, training, True, True, 4)(x)
    for group, one in enumerate(x):
        statistics = torch.cat(batch_statistics(model, weights, one))
        assert torch.allclose(found.statistics[group], statistics, atol=1e-4)
        assert torch.allclose(found.features[group], model.features(one), atol=1e-4)
    gradient = loss_gradient(model, weights, x[1], torch.tensor([4]), training)
    probe = Probe(model, weights, training, True, True, 4)
    wanted = probe.some(dict(zip(weights, gradient, strict=True)))
    for each, right in zip(found.gradients, wanted, strict=True):
        assert torch.allclose(each[1], right, atol=1e-4 * float(right.abs().max()) + 1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_step_is_predicted_better_than_the_mean_and_the_expected_psnr_says_so(
    optimizer: str,
) -> None:
    seen, known, images = client(replace(SGD, optimizer=optimizer, lr=1e-3))
    found = FeatureRegression(images=200)(seen, known)
    mean = load_bank(SHAPE).mean(0)
    assert (found.images - images).square().mean() < (mean - images).square().mean()
    assert "kernel on" in found.matching
    assert "expected PSNR" in found.matching
    assert (found.iterations, found.stop_reason) == (1, "predicted")
    assert found.flops > 0
    assert not any("match" in sentence for sentence in found.diagnosis)


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_what_is_observed_is_what_the_images_answer(batch_norm: str) -> None:
    # One step: the distance of the private images' own blocks is that of rounding.
    seen, known, images = client(replace(SGD, batch_norm=batch_norm))
    objective = regression(seen, known)
    predicted = objective.predict()
    x = (images - objective.mean) / objective.std
    blocks = ("statistics", "features") if batch_norm == "train" else ("features", "gradient")
    assert tuple(objective._blocks(objective._observed)) == blocks
    assert objective(x, 0.0) < 1e-2 < objective(predicted, 0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_several_steps_are_unmixed_as_far_as_features_tell_them_apart(optimizer: str) -> None:
    seen, known, images = client(replace(SGD, optimizer=optimizer, lr=1e-3, local_steps=3), 3)
    objective = regression(seen, known)
    predicted = objective.predict()
    assert predicted.shape == images.shape
    train, test = objective._unmixed(objective._learned, objective._observed)
    assert train.shape == (200, test.shape[1])
    # Without features every step takes its share of what the mixture says.
    said = (test - objective._learned.statistics.mean(0)) / torch.tensor(objective.shares)[:, None]
    alike = torch.allclose(said[0], said[1], rtol=1e-2, atol=1e-2)
    assert alike == (optimizer == "adam")


def test_a_batch_without_features_is_predicted_by_its_mean() -> None:
    training = replace(SGD, batch_size=4)
    for told in (True, False):
        seen, known, _ = client(replace(training, optimizer="sgd" if told else "adam"), 4)
        found = regression(seen, known).predict()
        assert torch.equal(found[0], found[3]) == (not told)


def test_an_update_that_gives_nothing_away_is_refused() -> None:
    seen, known, _ = client(replace(SGD, optimizer="adam", local_steps=2, send_buffers=False), 2)
    with pytest.raises(ValueError, match="optimizer is adam"):
        FeatureRegression()(seen, known)
    seen, known, _ = client(SGD)
    with pytest.raises(ValueError, match="defence"):
        FeatureRegression()(seen, replace(known, defense=Defense(clip=0.1)))


def test_features_of_a_model_without_biases_are_decoded_under_adam() -> None:
    # It makes nothing at all of the mean colour, where decoding starts.
    training = replace(SGD, optimizer="adam", lr=1e-3, batch_norm="eval")
    seen, known, _ = client(training, head="mlp")
    attack = AttackConfig("flow_matching", 4, options={"flow": 0})
    found = run_attack(seen, known, attack, PriorConfig(), 0)
    assert found.matching.startswith("low_rank")
    assert found.images.isfinite().all()
    assert found.losses[-1] < 0.5 * found.losses[0]

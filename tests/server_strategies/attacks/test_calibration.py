"""Signs are held to simulated healthy clients of the same model and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.clients import CLIENTS, MEAN, STD, client
from helpers.foreign import Small
from torch import nn

from client_app.training import train
from fl_app.benchmarks.diagnosis import batch_norm_cnn, mlp_3, sigmoid_lenet
from fl_app.models import known_model
from fl_app.models.foreign import own_model
from fl_app.protocol import Knowledge, LocalTraining, Observation, ParameterGroup
from server_strategies.attacks.diagnosis import calibration, diagnose
from server_strategies.attacks.diagnosis.calibration import Healthy
from server_strategies.attacks.labels import random_images
from server_strategies.attacks.matching.simulation import simulate, simulated_weights

DOUBTFUL = (0.6, 0.1)  # matching losses: every layer is compared
TRAININGS = {
    "sgd": LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=2),
    "adam": LocalTraining("adam", lr=1e-3, batch_size=2, local_steps=2),
    "rmsprop": LocalTraining("rmsprop", lr=1e-3, batch_size=2, local_steps=2),
}


def dropping() -> nn.Module:
    return Small(p=0.5)


def foreign(
    model: Callable[[], nn.Module],
    training: LocalTraining,
    shape: tuple[int, int, int] = (3, 32, 32),
) -> tuple[Observation, Knowledge]:
    """Train a user's own model on pictures that are no simulated client's."""
    labels = torch.tensor([1, 7, 4, 1])
    known = Knowledge(model, 10, shape, MEAN, STD, training)
    known = known.granting("by-step", tuple(labels.tolist()))
    w0 = known_model(known, seed=1).state_dict()
    own = own_model(known)
    own.load_state_dict(w0)
    x = random_images(4, known, torch.Generator().manual_seed(9))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    batches = [torch.tensor(batch) for batch in training.batches(4)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        train(own, x * std + mean, labels, batches, training, MEAN, STD)
    return Observation(w0, own.state_dict(), 4, round=1, node=1, client=1), known


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("model", [batch_norm_cnn, sigmoid_lenet, mlp_3, dropping])
def test_a_healthy_foreign_client_has_no_sign(model: Callable[[], nn.Module], name: str) -> None:
    shape = (3, 16, 16) if model is dropping else (3, 32, 32)
    observation, knowledge = foreign(model, TRAININGS[name], shape)
    assert diagnose(observation, knowledge, DOUBTFUL, None) == ()


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [("frozen", "layers 0, 4 did not change"), ("rate", "the update of 9 is")],
)
def test_layers_that_train_otherwise_are_named(name: str, fault: str, words: str) -> None:
    said = TRAININGS[name]
    trained = {
        "frozen": replace(said, trainable=("1.*", "5.*", "9.*", "11.*")),
        "rate": replace(said, groups=(ParameterGroup("9.*", said.lr / 50),)),
    }
    observation, knowledge = foreign(batch_norm_cnn, trained[fault])
    (sentence,) = diagnose(observation, replace(knowledge, training=said), DOUBTFUL, None)
    assert words in sentence and ("shorter" in sentence) == (fault == "rate")
    # What the protocol says is no fault.
    assert diagnose(observation, knowledge, DOUBTFUL, None) == ()


@pytest.mark.parametrize("model", [sigmoid_lenet, mlp_3])
def test_an_update_that_hardly_depends_on_the_images(model: Callable[[], nn.Module]) -> None:
    observation, knowledge = foreign(model, TRAININGS["sgd"])
    told = diagnose(observation, knowledge, (0.0, 0.0), None)
    assert len(told) == (model is sigmoid_lenet)
    assert all("hardly depends on the images" in sentence for sentence in told)


def test_what_shows_no_sign_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(calibration, "simulated_weights", lambda *_: made.append(1))
    observation, knowledge, _ = client(CLIENTS["sgd"])
    assert diagnose(observation, knowledge, (0.6, 0.01), None) == ()
    assert not made


def test_torchs_random_state_and_the_update_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, knowledge = foreign(dropping, TRAININGS["adam"], (3, 16, 16))
    sent = {name: w.clone() for name, w in observation.w0.items()}
    state = torch.get_rng_state()
    with torch.no_grad():  # as at an attack's end
        first, again = (Healthy(observation, knowledge).updates for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(observation.w0[name], w) for name, w in sent.items())
    assert len(first) == calibration.CLIENTS
    assert all(torch.equal(a.size, b.size) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].size, first[1].size)


def test_healthy_clients_of_a_sum_are_summed() -> None:
    training = replace(CLIENTS["sgd"], local_steps=0, local_epochs=1)
    observation, knowledge, _ = client(training)
    both = replace(observation, nodes=(1, 2), clients=(1, 2), examples=(4, 2))
    healthy = Healthy(both, knowledge)
    assert [each.steps for each in healthy.updates] == [2] * calibration.CLIENTS
    assert diagnose(both, knowledge, DOUBTFUL, None) == ()


@pytest.mark.parametrize("name", ["clipped", "adam", "nesterov"])
def test_weights_without_a_way_back_are_those_of_the_simulation(name: str) -> None:
    training = replace(CLIENTS[name], accumulate=2, proximal=0.1)
    observation, knowledge, x = client(training, torch.float64)
    model = known_model(knowledge).double()
    y = torch.tensor(knowledge.labels)
    batches = [(x[list(b)], y[list(b)]) for b in training.batches(6)]
    w0 = {n: observation.w0[n] for n, _ in model.named_parameters()}
    expected = simulate(model, w0, batches, training)
    for n, w in simulated_weights(model, w0, batches, training).items():
        torch.testing.assert_close(w, expected[n])

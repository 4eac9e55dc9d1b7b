"""Guessing a client's local training from its update alone, on real clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.clients import MEAN, STD, client

from client_app.training import train
from fl_app.models import create_model
from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.infer import infer
from server_strategies.attacks.matching.adam.fingerprints import single_step_updates
from server_strategies.attacks.matching.guess import guess_training
from server_strategies.observations import ObservationStore


def large_client(training: LocalTraining, count: int) -> Observation:
    """Train ConvNet on random images of CIFAR-10's size."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand((count, 3, 32, 32), generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    model = create_model("convnet", 10, (3, 32, 32), seed=2)
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.tensor(batch) for batch in training.batches(count)]
    train(model, images, labels, batches, training, MEAN, STD)
    return Observation(w0, model.state_dict(), count, round=1, node=1, client=1)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize(("batch_size", "steps"), [(6, 1), (2, 3), (1, 6)])
def test_a_known_batch_size_gives_the_rest(
    kind: str, batch_size: int, steps: int, large: bool
) -> None:
    lr = 3e-4 if kind == "adam" else 0.02
    training = LocalTraining(kind, lr=lr, batch_size=batch_size, local_steps=steps)
    observation = large_client(training, 6) if large else client(training)[0]
    guess = guess_training(observation, "classifier", batch_size)
    assert guess.training.optimizer == kind
    assert (guess.training.local_steps, guess.training.batch_size) == (steps, batch_size)
    tolerance = 0.1 * lr if kind == "adam" else lr
    assert lr / 2 < guess.training.lr and abs(guess.training.lr - lr) <= tolerance
    assert guess.confident == (kind == "adam")


@pytest.mark.parametrize(("batch_size", "steps"), [(6, 1), (2, 3), (1, 6)])
def test_adams_spikes_give_the_number_of_steps_too(batch_size: int, steps: int) -> None:
    training = LocalTraining("adam", lr=2e-3, batch_size=batch_size, local_steps=steps)
    guess = guess_training(client(training)[0], "classifier")
    assert guess.training == training
    assert guess.confident and "adamw looks the same" in guess.reason


def test_sgd_gives_only_the_product_of_rate_and_steps() -> None:
    training = LocalTraining("sgd", lr=0.02, batch_size=2, local_steps=3)
    guess = guess_training(client(training)[0], "classifier")
    assert not guess.confident and "can't be distinguished" in guess.reason
    product = guess.training.lr * guess.training.local_steps
    assert 0.03 < product < 0.12


@pytest.mark.parametrize("architecture", ["convnet", "mlp_mixer", "vit_tiny"])
def test_unknown_training_is_guessed_alike_from_memory_and_from_disk(
    architecture: str, tmp_path: Path
) -> None:
    training = LocalTraining("sgd", lr=0.02, batch_size=2, local_steps=3)
    observation, knowledge, _ = client(training, architecture=architecture)
    store, unknown = ObservationStore(tmp_path), replace(knowledge, training=None)
    store.save(observation)
    loaded = store.load(observation.id)
    assert list(loaded.w0) == list(loaded.w1) == list(observation.w0) != sorted(observation.w0)
    # As files without the order of the tensors give them.
    by_name = (dict(sorted(weights.items())) for weights in (observation.w0, observation.w1))
    for seen in (loaded, Observation(*by_name, 6, 1, 1, 1)):
        assert infer(seen, unknown) == infer(observation, unknown)


def test_single_step_updates_are_adams_arithmetic() -> None:
    for step in range(4):
        w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=1.0, eps=1e-30)
        for k in range(4):
            w.grad = torch.full_like(w, -0.3 if k == step else 0.0)
            optimizer.step()
        assert w.item() == pytest.approx(single_step_updates(4)[step].item())
    assert single_step_updates(1).tolist() == pytest.approx([1])


def test_nothing_to_guess_from_is_refused() -> None:
    observation, _, _ = client(LocalTraining("sgd", lr=0.02, batch_size=6, local_steps=1))
    with pytest.raises(ValueError, match="the update is zero"):
        guess_training(Observation(observation.w0, observation.w0, 6, 1, 1, 1), "classifier")
    with pytest.raises(ValueError, match="batch_size is 0; allowed: 1 or more"):
        guess_training(observation, "classifier", 0)
    w0, w1 = dict(observation.w0), dict(observation.w1)
    del w0["classifier.bias"], w1["classifier.bias"]
    with pytest.raises(ValueError, match="bias of the classifier; this model has none"):
        guess_training(Observation(w0, w1, 6, 1, 1, 1), "classifier")

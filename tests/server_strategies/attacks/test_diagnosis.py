"""Each sign on a real client with its fault injected; none on a healthy one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.clients import CLIENTS, MEAN, SHAPE, STD, client
from torch import Tensor

from client_app.training import train
from fl_app.models import create_model
from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.diagnosis import diagnose
from server_strategies.attacks.diagnosis.signs import unmatched
from server_strategies.attacks.matching.defended import noise_part
from server_strategies.attacks.matching.distance import CosineDistance, SquaredDistance

MATCHED = [0.6, 0.4, 0.05]
ONE_STEP = {
    "sgd": LocalTraining("sgd", lr=0.05, batch_size=6, local_steps=1),
    "adam": LocalTraining("adam", lr=1e-3, batch_size=6, local_steps=1),
}


def changed(observation: Observation, change: Callable[[Tensor, Tensor], Tensor]) -> Observation:
    """Return the observation of a client that changes its (w0, update) before sending."""
    w1 = {n: w - change(w, w - observation.w1[n]) for n, w in observation.w0.items()}
    return replace(observation, w1=w1)


@pytest.mark.parametrize("name", [*CLIENTS, "one step of sgd", "one step of adam"])
@pytest.mark.parametrize("architecture", ["convnet", "mlp"])
def test_a_healthy_update_has_no_sign(name: str, architecture: str) -> None:
    training = CLIENTS.get(name) or ONE_STEP[name.split()[-1]]
    observation, knowledge, _ = client(training, architecture=architecture)
    steps = len(training.batches(observation.num_examples))
    alpha = 0.0 if steps == 1 else 0.5  # a single gradient was taken at w0
    assert diagnose(observation, knowledge, MATCHED, alpha) == ()


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("noise", "noise with sigma of about"),
        ("clamp", "exactly the largest amount"),
        ("top-k", "70% of the weights did not change"),
        ("random mask", "it is sparsified"),
        ("bf16", "rounded to bfloat16"),
        ("fp16", "rounded to float16"),
    ],
)
def test_each_fault_has_its_sentence(name: str, fault: str, words: str) -> None:
    observation, knowledge, _ = client(replace(CLIENTS[name], weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    size = torch.cat([(w - observation.w1[n]).abs().flatten() for n, w in observation.w0.items()])
    bound, least = 0.2 * size.max(), size.quantile(0.7)
    changes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "noise": lambda w, u: u + 1e-4 * torch.randn(u.shape, generator=generator),
        "clamp": lambda w, u: u.clamp(-bound, bound),
        "top-k": lambda w, u: torch.where(u.abs() > least, u, 0),
        "random mask": lambda w, u: u * (torch.rand(u.shape, generator=generator) < 0.3),
        "bf16": lambda w, u: w - (w - u).bfloat16().float(),
        "fp16": lambda w, u: w - (w - u).half().float(),
    }
    (sentence,) = diagnose(changed(observation, changes[fault]), knowledge, MATCHED, None)
    assert words in sentence
    if fault == "noise":
        assert float(sentence.split()[-1]) == pytest.approx(1e-4, rel=0.35)


def test_a_converged_client_is_seen() -> None:
    training = ONE_STEP["sgd"]
    observation, knowledge, x = client(training)
    model = create_model("convnet", 10, SHAPE)
    model.load_state_dict(dict(observation.w0))
    images = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    labels, batch = torch.tensor(knowledge.labels), torch.arange(6)
    train(
        model, images, labels, [batch] * 80, replace(training, optimizer="adam", lr=1e-3), MEAN, STD
    )
    w0 = {name: w.clone() for name, w in model.state_dict().items()}
    train(model, images, labels, [batch], training, MEAN, STD)
    seen = Observation(w0, model.state_dict(), 6, 1, 1, 1)
    (sentence,) = diagnose(seen, knowledge, MATCHED, None)
    assert "the gradient is close to zero" in sentence


def signs(observation: Observation, knowledge: Knowledge, **training: object) -> tuple[str, ...]:
    assumed = replace(knowledge, training=replace(knowledge.training, **training))  # type: ignore[arg-type]
    return diagnose(observation, assumed, MATCHED, None)


def test_a_wrong_training_is_seen() -> None:
    observation, knowledge, _ = client(CLIENTS["adam"])
    assert "not as by sgd" in signs(observation, knowledge, optimizer="sgd")[0]
    few, known, _ = client(replace(CLIENTS["adam"], weight_decay=0.0, local_steps=2))
    (sentence,) = signs(few, known, optimizer="sgd")  # neither clamped nor sparsified
    assert "not as by sgd" in sentence
    assert "adam can't make" in signs(observation, knowledge, lr=1e-4)[0]
    assert "lr is smaller" in signs(observation, knowledge, lr=0.1)[0]
    observation, knowledge, _ = client(CLIENTS["sgd"])
    assert "heavy tail" in signs(observation, knowledge, optimizer="adam", lr=1.0)[0]
    observation, knowledge, _ = client(ONE_STEP["adam"])
    several = signs(observation, knowledge, batch_size=2, local_steps=3)
    assert any(
        "as by one step of adam" in sentence or "clamped" in sentence for sentence in several
    )


def test_batch_norm_in_training_mode_is_seen() -> None:
    observation, knowledge, _ = client(CLIENTS["sgd"])
    statistics = {"bn.running_mean": torch.zeros(4), "bn.num_batches_tracked": torch.tensor(0)}
    w0 = {**observation.w0, **statistics}
    still = replace(observation, w0=w0, w1={**observation.w1, **statistics})
    (sentence,) = diagnose(still, knowledge, MATCHED, None)
    assert "did not change: the client trained in evaluation mode" in sentence
    assert signs(still, knowledge, batch_norm="eval") == signs(still, knowledge, send_buffers=False)
    assert signs(still, knowledge, batch_norm="eval") == ()
    moved = {**observation.w1, "bn.running_mean": torch.ones(4)}
    moved["bn.num_batches_tracked"] = torch.tensor(1)
    seen = replace(observation, w0=w0, w1=moved)
    assert diagnose(seen, knowledge, MATCHED, None) == ()
    (sentence,) = signs(seen, knowledge, batch_norm="eval")
    assert "which an objective in evaluation mode does not reproduce" in sentence
    (sentence,) = signs(seen, knowledge, send_buffers=False)
    assert "clients are to return those sent" in sentence


def test_signs_of_a_failed_optimisation() -> None:
    observation, knowledge, _ = client(CLIENTS["sgd"])
    failed = diagnose(observation, knowledge, [0.6] * 20, 0.0)
    assert [any(words in sentence for sentence in failed) for words in
            ("does not match", "hardly fell", "alpha ran to 0.00")] == [True] * 3  # fmt: skip
    assert unmatched([0.9, 0.5], floor=0.4) is None
    one_step, single, _ = client(ONE_STEP["sgd"])
    assert "alpha ran to 1.00" in diagnose(one_step, single, MATCHED, 1.0)[0]
    same = replace(observation, w1=observation.w0)
    assert "the update is zero" in diagnose(same, knowledge, [], None)[0]


def test_noise_leaves_the_distance_of_an_orthogonal_vector() -> None:
    # Noise as long as the update itself, at a right angle: cos 45 degrees.
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(20_000, generator=generator)
    seen = clean + torch.randn(20_000, generator=generator)
    share = noise_part(seen.abs(), 1.0)
    for distance in (CosineDistance, SquaredDistance):
        left = distance([seen])([clean]).item()
        assert distance.at_truth(share) == pytest.approx(left, abs=0.02)

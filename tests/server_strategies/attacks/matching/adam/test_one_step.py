"""Explanations of a single local step: against the gradient itself and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.clients import MEAN, SHAPE, STD, client
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.config import AttackConfig, PriorConfig
from fl_app.models import create_model
from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.adam.one_step import (
    EpsInversion,
    GradientMatch,
    SignMatch,
    mean_step,
)
from server_strategies.attacks.matching.closed_form import (
    first_linear,
    linear_inputs,
    patch_embedding,
    patch_inputs,
)
from server_strategies.attacks.matching.distance import CosineDistance
from server_strategies.attacks.run import run_attack

SGD = LocalTraining("sgd", lr=0.05, batch_size=6, local_steps=1)
ADAM = LocalTraining("adam", lr=1e-3, batch_size=6, local_steps=1)


def explained(kind: type[GradientMatch], observation: Observation, knowledge: Knowledge):
    return kind(create_model(knowledge.model, 10, SHAPE), observation, knowledge, "asked for")


def gradient(observation: Observation, knowledge: Knowledge, x: Tensor) -> list[Tensor]:
    model = create_model(knowledge.model, 10, SHAPE).to(x.dtype)
    model.load_state_dict(dict(observation.w0))
    F.cross_entropy(model(x), torch.tensor(knowledge.labels)).backward()
    return [w.grad for w in model.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_one_step_of_sgd_is_its_gradient(settings: dict) -> None:
    training = replace(SGD, **settings)
    observation, knowledge, x = client(training, torch.float64)
    w0, w1 = list(observation.w0.values()), list(observation.w1.values())
    for found, true in zip(
        mean_step(w0, w1, training, 1), gradient(observation, knowledge, x), strict=True
    ):
        assert torch.allclose(found, true, atol=1e-12)


def test_a_client_clips_its_gradient() -> None:
    for bound, clipped in ((0.1, True), (100.0, False)):
        training = replace(SGD, max_grad_norm=bound)
        observation, knowledge, x = client(training, torch.float64)
        w0, w1 = list(observation.w0.values()), list(observation.w1.values())
        found = torch.cat([r.flatten() for r in mean_step(w0, w1, training, 1)])
        true = torch.cat([g.flatten() for g in gradient(observation, knowledge, x)])
        expected = true * bound / true.norm() if clipped else true
        assert torch.allclose(found, expected, atol=1e-6)


def test_momentum_hands_a_gradient_on() -> None:
    # A constant gradient of 1: velocities 1, 1.9, 2.71 after which Nesterov looks ahead once more.
    for nesterov, worth in ((False, 1 + 1.9 + 2.71), (True, 1.9 + 2.71 + 3.439)):
        training = replace(SGD, momentum=0.9, nesterov=nesterov, lr=0.5)
        w = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9, nesterov=nesterov)
        for _ in range(3):
            w.grad = torch.ones(1)
            optimizer.step()
        assert w.item() == pytest.approx(-0.5 * worth)
        found = mean_step([torch.zeros(1)], [w.detach()], training, 3)
        assert found[0].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "training", "bound"),
    [
        (GradientMatch, replace(SGD, momentum=0.9, weight_decay=0.1), 1e-5),
        (GradientMatch, replace(SGD, max_grad_norm=0.1), 1e-5),
        (EpsInversion, ADAM, 0.005),
        (EpsInversion, replace(ADAM, weight_decay=1e-3), 0.005),
        (EpsInversion, replace(ADAM, optimizer="adamw", weight_decay=0.1), 0.01),
        (EpsInversion, replace(ADAM, max_grad_norm=0.1), 0.005),
        (SignMatch, ADAM, 1e-4),
        (SignMatch, replace(ADAM, weight_decay=1e-3), 1e-4),
        (SignMatch, replace(ADAM, optimizer="adamw", weight_decay=0.1), 1e-4),
    ],
)
def test_the_truth_is_the_minimum(
    kind: type[GradientMatch], training: LocalTraining, bound: float
) -> None:
    observation, knowledge, x = client(training)
    objective = explained(kind, observation, knowledge)
    assert objective(x, 0.0).item() == pytest.approx(0, abs=bound)
    others = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = objective(others, 0.0)
    loss.backward(inputs=[others])
    assert loss.item() > 0.1
    assert others.grad is not None and others.grad.isfinite().all() and others.grad.any()


def test_gradients_do_not_explain_adam_but_its_inversion_does() -> None:
    observation, knowledge, x = client(ADAM)
    assert explained(GradientMatch, observation, knowledge)(x, 0.0).item() > 0.2
    usable, reason = EpsInversion.usable(observation, ADAM)
    assert usable and "coordinates" in reason


def changed(observation: Observation, fault: str) -> Observation:
    generator = torch.Generator().manual_seed(0)
    w1 = {}
    for name, before in observation.w0.items():
        u = before - observation.w1[name]
        if fault == "noise":
            u = u + 1e-5 * torch.randn(u.shape, generator=generator)
        elif fault == "clamp":
            u = u.clamp(-5e-4, 5e-4)
        elif fault == "zero":
            u = u * 0
        w1[name] = (before - u).bfloat16().float() if fault == "bf16" else before - u
    return replace(observation, w1=w1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("noise", "longer than lr"),
        ("bf16", "longer than lr"),
        ("clamp", "longest step is 0.5 lr"),
        ("zero", "is zero"),
    ],
)
def test_what_destroys_the_inversion_is_seen_beforehand(fault: str, words: str) -> None:
    observation, knowledge, _ = client(ADAM)
    spoilt = changed(observation, fault)
    usable, reason = EpsInversion.usable(spoilt, ADAM)
    assert not usable and words in reason
    with pytest.raises(ValueError, match=f"can't be inverted: .*{words}"):
        explained(EpsInversion, spoilt, knowledge)


def test_the_inversion_is_for_one_step_of_adam() -> None:
    observation, _, _ = client(SGD)
    assert EpsInversion.usable(observation, SGD)[1].startswith("the client uses sgd")
    several = replace(ADAM, batch_size=2, local_steps=3)
    observation, _, _ = client(several)
    assert EpsInversion.usable(observation, several) == (
        False,
        "the client makes 3 local steps; allowed: 1",
    )


def test_sign_match_by_hand() -> None:
    observation, knowledge, _ = client(ADAM)
    x = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(1))
    r = torch.cat(
        [(w - observation.w1[n]).flatten() / ADAM.lr for n, w in observation.w0.items()]
    ).double()
    g = torch.cat([part.flatten() for part in gradient(observation, knowledge, x)]).double()
    dead = r == 0
    assert g[dead].any()
    expected = 1 - (r * g).sum() / ((r * g).abs().sum() + g[dead].abs().sum())
    found = explained(SignMatch, observation, knowledge)(x, 0.0).item()
    assert found == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "training", "architecture", "bound"),
    [
        (GradientMatch, SGD, "mlp", 1e-3),
        (GradientMatch, SGD, "vit_tiny", 0.02),
        (EpsInversion, ADAM, "mlp", 0.05),
    ],
)
def test_one_image_is_given_away_in_closed_form(
    kind: type[GradientMatch], training: LocalTraining, architecture: str, bound: float
) -> None:
    training = replace(training, batch_size=1)
    observation, knowledge, x = client(training, architecture=architecture, count=1)
    start = explained(kind, observation, knowledge).start
    assert start is not None and start.shape == x.shape
    # Adam: a pixel is lost where rounding leaves no unit's gradient.
    assert (start - x).abs().median() < bound
    for count, other in ((2, architecture), (1, "convnet")):
        mixed = replace(training, batch_size=count)
        observation, knowledge, _ = client(mixed, architecture=other, count=count)
        assert explained(kind, observation, knowledge).start is None


@pytest.mark.parametrize("architecture", ["mlp", "vit_tiny"])
def test_a_search_stays_at_the_closed_form(architecture: str) -> None:
    observation, knowledge, x = client(
        replace(SGD, batch_size=1), architecture=architecture, count=1, smooth=True
    )
    config = AttackConfig("flow_matching", 10, options={"flow": 0})
    found = run_attack(observation, knowledge, config, PriorConfig(), seed=0).images
    private = x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    assert (found - private).square().mean() < 1e-4  # 40 dB


def test_linear_inputs_by_hand() -> None:
    x, db = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.0, -2.0])
    rows = linear_inputs(db[:, None] * x, db)
    assert rows.tolist() == [[3, -1], [3, -1]]


def test_first_linear_layers() -> None:
    assert first_linear(create_model("mlp", 10, SHAPE)) == "fc1"
    assert first_linear(create_model("convnet", 10, SHAPE)) is None
    assert first_linear(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) == "1"
    assert first_linear(nn.Sequential(nn.Linear(4, 2, bias=False))) is None
    assert first_linear(nn.ReLU()) is None


def test_patches_with_positions() -> None:
    assert patch_embedding(create_model("vit_tiny", 10, SHAPE), SHAPE) == ("patches", "positions")
    for other in ("mlp_mixer", "convnet", "mlp"):
        assert patch_embedding(create_model(other, 10, SHAPE), SHAPE) is None


def test_patches_follow_from_the_slopes_of_their_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, slopes = (torch.randn(*size, generator=generator) for size in ((4, 3, 2, 2), (4, 9)))
    gradient = sum(slopes[t, :, None, None, None] * x[t] for t in range(4))
    slopes[1, 3] = torch.nan  # its equation is left out
    assert torch.allclose(patch_inputs(gradient, slopes), x, atol=1e-5)
    slopes[2, :6] = torch.nan
    assert patch_inputs(gradient, slopes) is None


def test_a_masked_cosine_ignores_what_is_masked() -> None:
    seen, mask = [torch.tensor([1.0, 5.0, 1.0])], [torch.tensor([True, False, True])]
    distance = CosineDistance(seen, mask)
    assert distance([torch.tensor([2.0, -9.0, 2.0])]).item() == pytest.approx(0, abs=1e-6)
    assert distance([torch.tensor([1.0, 5.0, 0.0])]).item() == pytest.approx(1 - 0.5**0.5)
    with pytest.raises(ValueError, match="zero"):
        CosineDistance(seen, [torch.tensor([False] * 3)])

"""Matching a single step: at the ground truth, by its formula, and where it is impossible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.clients import SHAPE, client
from helpers.matching import objective_of, true_gradient

from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.matching.adam.one_step import EpsInversion, SignMatch
from server_strategies.attacks.matching.gradient_match import GradientMatch

SGD = LocalTraining("sgd", lr=0.05, batch_size=6, local_steps=1)
ADAM = LocalTraining("adam", lr=1e-3, batch_size=6, local_steps=1)


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
    objective = objective_of(kind, observation, knowledge)
    assert objective(x, 0.0).item() == pytest.approx(0, abs=bound)
    others = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = objective(others, 0.0)
    loss.backward(inputs=[others])
    assert loss.item() > 0.1
    assert others.grad is not None and others.grad.isfinite().all() and others.grad.any()


def test_gradients_do_not_match_adam_but_its_inversion_does() -> None:
    observation, knowledge, x = client(ADAM)
    assert objective_of(GradientMatch, observation, knowledge)(x, 0.0).item() > 0.2
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
def test_faults_that_prevent_the_inversion_are_detected_beforehand(fault: str, words: str) -> None:
    observation, knowledge, _ = client(ADAM)
    faulty = changed(observation, fault)
    usable, reason = EpsInversion.usable(faulty, ADAM)
    assert not usable and words in reason
    with pytest.raises(ValueError, match=f"can't be inverted: .*{words}"):
        objective_of(EpsInversion, faulty, knowledge)


def test_the_inversion_is_for_one_step_of_adam() -> None:
    observation, _, _ = client(SGD)
    assert EpsInversion.usable(observation, SGD)[1].startswith("the client uses sgd")
    several = replace(ADAM, batch_size=2, local_steps=3)
    observation, _, _ = client(several)
    assert EpsInversion.usable(observation, several) == (
        False,
        "the client makes 3 local steps; allowed: 1",
    )


def test_sign_match_is_its_formula() -> None:
    observation, knowledge, _ = client(ADAM)
    x = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(1))
    r = torch.cat(
        [(w - observation.w1[n]).flatten() / ADAM.lr for n, w in observation.w0.items()]
    ).double()
    g = torch.cat([part.flatten() for part in true_gradient(observation, knowledge, x)]).double()
    dead = r == 0
    assert g[dead].any()
    expected = 1 - (r * g).sum() / ((r * g).abs().sum() + g[dead].abs().sum())
    found = objective_of(SignMatch, observation, knowledge)(x, 0.0).item()
    assert found == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "training", "architecture", "bound"),
    [
        (GradientMatch, SGD, "mlp", 1e-3),
        (GradientMatch, SGD, "vit_tiny", 0.02),
        (EpsInversion, ADAM, "mlp", 0.05),
    ],
)
def test_one_image_is_known_in_closed_form(
    kind: type[GradientMatch], training: LocalTraining, architecture: str, bound: float
) -> None:
    training = replace(training, batch_size=1)
    observation, knowledge, x = client(training, architecture=architecture, count=1)
    start = objective_of(kind, observation, knowledge).start
    assert start is not None and start.shape == x.shape
    # Adam: a pixel is lost where rounding leaves no unit's gradient.
    assert (start - x).abs().median() < bound
    for count, other in ((2, architecture), (1, "convnet")):
        mixed = replace(training, batch_size=count)
        observation, knowledge, _ = client(mixed, architecture=other, count=count)
        assert objective_of(kind, observation, knowledge).start is None

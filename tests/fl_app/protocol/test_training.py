"""What a client's training may be, and what of it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from client_app.defended_steps import check_defense
from client_app.training import check_training
from fl_app.models import create_model
from fl_app.protocol import Defense, LocalTraining, ParameterGroup
from fl_app.protocol.optimizer import create_optimizer


def test_lists_and_mappings_become_what_can_be_hashed() -> None:
    training = LocalTraining(
        "rmsprop",
        optimizer_options={"eps": 1e-6, "centered": True},
        schedule=[1, 0.5],
        groups=[{"pattern": "*.bias", "lr": 0.1}, ParameterGroup("fc*", weight_decay=0.2)],
    )
    same = LocalTraining(
        "rmsprop",
        optimizer_options=[["centered", True], ["eps", 1e-6]],  # as YAML keeps them
        schedule=(1, 0.5),
        groups=(ParameterGroup("*.bias", 0.1), ParameterGroup("fc*", None, 0.2)),
    )
    assert hash(training) == hash(same) and training == same
    assert [training.factor(step) for step in range(4)] == [1, 0.5, 0.5, 0.5]
    assert training.rates("fc1.bias") == (0.1, 0.0)  # the first match decides
    assert training.rates("fc1.weight") == (1e-3, 0.2)
    assert training.rates("classifier.weight") == (1e-3, 0.0)


def test_what_is_beyond_plain_training_is_named() -> None:
    plain = LocalTraining("sgd", momentum=0.9, nesterov=True, max_grad_norm=1.0, reshuffle=False)
    assert plain.beyond() == ""
    assert LocalTraining("nadam").beyond() == "optimizer is nadam"
    smoothed = LocalTraining(label_smoothing=0.1, drop_last=True)
    assert smoothed.beyond("drop_last") == "label_smoothing is 0.1"
    assert smoothed.beyond("drop_last", "label_smoothing") == ""
    assert LocalTraining(loss=nn.functional.nll_loss).beyond() == "loss is nll_loss"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "rprop"}, "optimizer is 'rprop'; allowed: adam, adamw, sgd, rmsprop"),
        ({"optimizer": "rmsprop", "momentum": 0.9}, "momentum is 0.9; allowed with rmsprop: 0"),
        ({"loss": "hinge"}, "loss is 'hinge'; allowed: cross_entropy, mse, bce, or a callable"),
        ({"loss": "mse", "label_smoothing": 0.1}, "label_smoothing is 0.1; allowed with loss mse"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; allowed: 0 to less than 1"),
        ({"class_weights": (0, 0)}, r"class_weights is \(0, 0\); allowed: numbers of 0 or more"),
        ({"schedule": (1, -1)}, "schedule is .* allowed: numbers of 0 or more"),
        ({"schedule": 0.5}, "schedule is 0.5; allowed: a list"),
        ({"trainable": "fc1"}, "trainable is 'fc1'; allowed: a list"),
        ({"accumulate": 0}, "accumulate is 0; allowed: 1 or more"),
        ({"proximal": -1}, "proximal is -1; allowed: 0 or more"),
        ({"groups": [{"lr": 1}]}, "groups holds .*; allowed: pattern, and lr, weight_decay"),
        ({"groups": [{"pattern": "*", "lr": 0}]}, "lr of '[*]' is 0; allowed: more than 0"),
        ({"optimizer_options": {"eps": "x"}}, "optimizer_options.eps is 'x'; allowed: a number"),
        ({"optimizer_options": 3}, "optimizer_options is 3; allowed: a mapping"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalTraining(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "rmsprop", "optimizer_options": {"beta": 1}},
            "optimizer_options holds beta; allowed with rmsprop: alpha, centered, eps, maximize, m",
        ),
        ({"optimizer_options": {"lr": 1}}, "optimizer_options holds lr; allowed with adam: amsgr"),
        ({"optimizer_options": {"betas": 0.9}}, "adam refuses it"),
        ({"optimizer_options": {"betas": (2, 0.9)}}, "adam refuses it: Invalid beta"),
        ({"trainable": ("head.*",)}, "trainable is head.*; allowed: patterns of some of fc1.weigh"),
        ({"class_weights": (1, 2)}, "class_weights has 2 numbers; allowed: 10"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_training(LocalTraining(**settings), create_model("mlp", 10, (3, 8, 8)), 10)


@pytest.mark.parametrize(
    ("defense", "settings", "message"),
    [
        (Defense(dp_clip=1.0, dp_noise=1.0), {"proximal": 0.1}, "client.proximal is 0.1: 0"),
        (Defense(dp_clip=1.0, dp_noise=1.0), {"accumulate": 2}, "client.accumulate is 2: 0"),
        (Defense(soteria=0.5), {"trainable": ("fc1.*",)}, "client.trainable leaves out the class"),
    ],
)
def test_defended_steps_refuse_what_they_would_not_defend(
    defense: Defense, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_defense(defense, LocalTraining(**settings), create_model("mlp", 10, (3, 8, 8)))


def test_an_optimiser_follows_the_schedule_from_any_step() -> None:
    weights = {"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))}
    groups = (ParameterGroup("b", lr=10.0),)
    training = LocalTraining("sgd", lr=1.0, schedule=(1.0, 0.5, 0.25), groups=groups)
    for step, moved in ((0, 1.75), (1, 0.75)):
        optimizer = create_optimizer(weights, training, step=step)
        for weight in weights.values():
            weight.data.zero_()
            weight.grad = torch.ones(1)
        for _ in range(3 - step):
            optimizer.step()
        assert [-w.item() for w in weights.values()] == [moved, 10 * moved]

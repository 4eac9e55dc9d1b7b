"""Models of the field's libraries: each is attacked, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers.foreign import client
from torch import nn

from fl_app.models import known_model
from fl_app.protocol import Observation
from fl_app.runs.checking import sample, trained
from fl_app.runs.weights import state_names
from fl_app.util.vision import import_torchvision
from flowleak import Budget
from flowleak.attacks import InvertingGradients

import_torchvision()  # before timm and transformers do it, which do not know a CPU-only torch


def _torchvision(name: str, **settings: Any) -> nn.Module:
    found: nn.Module = getattr(import_torchvision().models, name)(num_classes=10, **settings)
    return found


def _timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    settings = {"num_classes": 10, "img_size": 16, "patch_size": 8, "depth": 1}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **settings)
    return model


def _hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_labels=10,
        num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def _sigmoid_lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5),
        nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 84), nn.Sigmoid(),
        nn.Linear(84, 10),
    )  # fmt: skip


def _batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(1024, 10),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 10))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(_torchvision, "resnet18"),
    "mobilenet": partial(_torchvision, "mobilenet_v3_small"),
    "timm": _timm,
    "hugging-face": _hugging_face,
    "sigmoid-lenet": _sigmoid_lenet,
    "batch-norm": _batch_norm_cnn,
    "mlp": _mlp,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_attacked(name: str) -> None:
    described = client(FAMILIES[name], batch_size=2)
    given = sample(described, examples=4)
    w1 = trained(described, described.training, given)
    names = state_names(known_model(described.knowledge))
    weights = ({each: side[each] for each in names} for side in (given.w0, w1))
    seen = Observation(*weights, num_examples=4, round=1, node=0, client=0)
    known = described.knowledge.granting("counts", tuple(given.labels.tolist()))
    found = InvertingGradients(matching="trajectory")(seen, known, budget=Budget(iterations=1))
    assert found.images.shape == (4, 3, 16, 16)


def test_stochastic_depth_is_refused() -> None:
    described = client(partial(_torchvision, "efficientnet_b0"))
    with pytest.raises(ValueError, match="draws random numbers in training"):
        known_model(described.knowledge)

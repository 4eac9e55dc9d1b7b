"""Images that follow from a gradient in closed form: constructed layers, and an attack's start."""

from __future__ import annotations

import pytest
import torch
from helpers.clients import MEAN, SHAPE, STD, client
from torch import nn

from fl_app.config import AttackConfig, PriorConfig
from fl_app.models import create_model
from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.closed_form import (
    first_linear,
    linear_inputs,
    patch_embedding,
    patch_inputs,
)
from server_strategies.attacks.run import run_attack

SGD = LocalTraining("sgd", lr=0.05, batch_size=1, local_steps=1)


@pytest.mark.parametrize("architecture", ["mlp", "vit_tiny"])
def test_a_search_stays_at_the_closed_form(architecture: str) -> None:
    observation, knowledge, x = client(SGD, architecture=architecture, count=1, smooth=True)
    config = AttackConfig("flow_matching", 10, options={"flow": 0})
    found = run_attack(observation, knowledge, config, PriorConfig(), seed=0).images
    private = x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    assert (found - private).square().mean() < 1e-4  # 40 dB


def test_linear_inputs_are_their_formula() -> None:
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


def test_patches_follow_from_the_gradients_of_their_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, slopes = (torch.randn(*size, generator=generator) for size in ((4, 3, 2, 2), (4, 9)))
    gradient = sum(slopes[t, :, None, None, None] * x[t] for t in range(4))
    slopes[1, 3] = torch.nan  # its equation is left out
    assert torch.allclose(patch_inputs(gradient, slopes), x, atol=1e-5)
    slopes[2, :6] = torch.nan
    assert patch_inputs(gradient, slopes) is None

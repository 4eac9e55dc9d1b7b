"""The measurements of A1 and A2, on flows whose answers are known and on a real attack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fl_app.benchmarks import assumptions
from fl_app.benchmarks.assumptions import (
    CORRUPTIONS,
    TIMES,
    attack_path,
    corrupt,
    jacobian_norm,
    measure_alignment,
    path_ratios,
    pixelate,
)
from fl_app.commands.main import app
from fl_app.config import load_config
from fl_app.data import dataset_info, load_split


class Linear(nn.Module):
    """v = scale (target - x), channel by channel."""

    def __init__(self, scale: tuple[float, float, float], target: Tensor | float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale).view(-1, 1, 1))
        self.target = target

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * (self.target - x)


def test_lipschitz_estimates_of_a_linear_flow() -> None:
    iterates = torch.rand((4, 2, 3, 8, 8))
    assert torch.allclose(
        path_ratios(Linear((2.0, 2.0, 2.0)), iterates), torch.full((4, 6, 2), 2.0)
    )
    mixed = Linear((1.0, 2.0, 4.0))
    assert path_ratios(mixed, iterates).max() < 4
    assert jacobian_norm(mixed, iterates[0], 0.9, 10).tolist() == pytest.approx([4, 4], rel=1e-4)


def test_alignment_of_a_flow_that_leads_back() -> None:
    clean = torch.rand((3, 3, 16, 16))
    network = Linear((1.0, 1.0, 1.0), 2 * clean - 1)
    for kind in CORRUPTIONS:
        found = measure_alignment(network, kind, *corrupt(clean, kind), clean)
        assert found.distance[0].max() == 0
        distance = found.distance[:, None].expand(-1, len(TIMES), -1)
        assert torch.allclose(found.values["|v|"], distance, atol=1e-5)
        assert found.values["cos(v, clean - x)"][1:].min() > 0.999
        assert found.values["|x - D|"][:, -1].isnan().all()  # t = 1
        assert found.rank_correlation("|v|")[0] == pytest.approx([1, 1, 1])
    away = measure_alignment(
        Linear((-1.0, -1.0, -1.0), 2 * clean - 1), kind, *corrupt(clean, kind), clean
    )
    assert away.values["cos(v, clean - x)"][1:].max() < -0.999


def test_pixelation_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).expand(1, 3, 2, 4)
    expected = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 3, 2, 4)
    assert torch.equal(pixelate(image, 2, torch.Generator()), expected)


def test_the_iterates_are_those_of_a_real_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    client = replace(assumptions.CLIENT, batch_size=1, local_steps=2)
    monkeypatch.setattr(assumptions, "CLIENT", client)
    config = load_config().dataset
    path = attack_path(load_split(config, "test"), dataset_info(config), "compact", 4, kept=3)
    assert path.iterations == (0, 2, 4)
    assert path.iterates.shape == (3, *path.clean.shape)
    assert 0 <= path.iterates.min() <= path.iterates.max() <= 1
    # The peak learning rate of 0.8 moves a normalised pixel by at most that in a step.
    moved = (path.iterates[1:] - path.iterates[:-1]).abs().amax()
    assert 0 < moved <= 2 * 0.8 * max(dataset_info(config).std) + 1e-5


def test_assumptions_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = replace(assumptions.CLIENT, batch_size=1, local_steps=2)
    monkeypatch.setattr(assumptions, "CLIENT", client)
    monkeypatch.setattr(assumptions, "_POWER_ITERATIONS", 1)
    out = tmp_path / "assumptions.md"
    command = ["prior", "assumptions", "compact", "--dataset", "photos", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--images", "2", "--iterations", "2"])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    assert text in result.output
    assert text.count("| attack, iterations done |") == 4 * 3 + 2
    with pytest.raises(ValueError, match="iterations is 1; allowed: 2 or more"):
        CliRunner().invoke(app, [*command, "--iterations", "1"], catch_exceptions=False)
    with pytest.raises(ValueError, match="images is 1; allowed: 2 to"):
        CliRunner().invoke(app, [*command, "--images", "1"], catch_exceptions=False)

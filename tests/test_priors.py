"""Priors: hand-computed penalties, and a training that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from server_strategies.priors.flow import FlowPrior, load_flow
from server_strategies.priors.networks import NETWORKS, create_network
from server_strategies.priors.total_variation import TotalVariation
from server_strategies.priors.training import (
    Trainer,
    TrainingSettings,
    draw_times,
    flow_matching_loss,
    load_images,
)

QUIET = Console(quiet=True)
TINY = TrainingSettings(images=48, batch_size=8, warmup=2)


class Constant(nn.Module):
    """A velocity that is the same everywhere, with one parameter to train."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.value.expand_as(x)


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 0.5], [1.0, 1.0]]]])
    # across: |0.5| and |0|, mean 0.25; down: |1| and |0.5|, mean 0.75; std 0.5 doubles both
    assert TotalVariation(0.1, (0.5,))(image, 0.0).item() == pytest.approx(0.1 * (0.5 + 1.5) / 2)


def test_denoiser_penalty_by_hand() -> None:
    images = torch.rand((2, 3, 8, 8), requires_grad=True)
    prior = FlowPrior(Constant(0.3), 2.0, "denoiser", 0.8, 0.9, torch.Generator().manual_seed(5))
    penalty = prior(images, 0.5)
    t, x = 0.85, 2 * images.detach() - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    residual = x - (t * x + (1 - t) * noise + (1 - t) * 0.3)
    assert penalty.item() == pytest.approx(2 * residual.square().mean().item(), rel=1e-5)
    penalty.backward()
    # D is held constant: d/dimages of 2 mean (x - D)^2, with x = 2 images - 1.
    assert images.grad is not None
    assert torch.allclose(images.grad, 2 * 2 * residual / residual.numel() * 2, atol=1e-7)


def test_velocity_penalty_is_back_propagated() -> None:
    network = create_network("compact")
    nn.init.normal_(network.tail.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    images = torch.rand((1, 3, 8, 8), requires_grad=True)
    prior = FlowPrior(network, 0.5, "velocity", 0.9, 0.9, torch.Generator())
    penalty = prior(images, 0.0)
    velocity = network(2 * images - 1, torch.tensor([0.9]))
    assert penalty.item() == pytest.approx(0.5 * velocity.square().mean().item(), rel=1e-5)
    penalty.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_flow_prior_refuses_what_it_cannot_do() -> None:
    def prior(mode: str = "denoiser", t_end: float = 0.9) -> FlowPrior:
        return FlowPrior(Constant(0.0), 1.0, mode, 0.8, t_end, torch.Generator())

    with pytest.raises(ValueError, match="allowed: denoiser, velocity"):
        prior(mode="magic")
    with pytest.raises(ValueError, match=r"t_end is 1\.5"):
        prior(t_end=1.5)
    for shape in [(1, 1, 8, 8), (1, 3, 6, 8)]:
        with pytest.raises(ValueError, match="the flow prior takes images"):
            prior()(torch.rand(shape), 0.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_small_and_larger_images(name: str) -> None:
    network = create_network(name)
    for side in (32, 64):
        x = torch.randn((2, 3, side, side))
        assert network(x, torch.rand(2)).shape == x.shape


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are not shipped"):
        load_flow("nonsense")
    with pytest.raises(ValueError, match="no such file"):
        load_flow("nonsense.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_flow(str(garbage))
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other, metadata={"network": "compact"})
    with pytest.raises(ValueError, match="does not fit the network 'compact'"):
        load_flow(str(other))
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="unknown flow network"):
        load_flow(str(other))


def test_shipped_prior_denoises() -> None:
    network = load_flow("compact")
    images = torch.linspace(-1, 1, 32).expand(4, 3, 32, 32)  # a smooth ramp, unseen
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    x_t = 0.8 * images + 0.2 * noise
    denoised = x_t + 0.2 * network(x_t, torch.full((4,), 0.8))
    # Scaling the noise away alone leaves (0.2 / 0.8)^2.
    assert (denoised - images).square().mean() < 0.3 * (0.2 / 0.8) ** 2


def test_loss_is_zero_for_the_true_velocity() -> None:
    clean, noise = torch.full((3, 3, 4, 4), 0.7), torch.full((3, 3, 4, 4), 0.4)
    times = torch.tensor([0.0, 0.5, 1.0])
    assert flow_matching_loss(Constant(0.3), clean, noise, times).abs().max() < 1e-10
    assert torch.allclose(
        flow_matching_loss(Constant(0.5), clean, noise, times), torch.full((3,), 0.04)
    )


def test_times_are_drawn_where_attacks_use_them() -> None:
    times = draw_times(20_000, 0.8, torch.Generator().manual_seed(0))
    assert times.min() >= 0
    assert times.max() <= 1
    assert (times > 0.6).float().mean().item() == pytest.approx(0.8, abs=0.02)


def images(count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_a_killed_training_resumes(tmp_path: Path) -> None:
    whole = Trainer(images(), TINY, tmp_path / "whole", "noise")
    whole.run(QUIET)
    part = Trainer(images(), TINY, tmp_path / "part", "noise")
    for _, batch in zip(range(2), part.batches(), strict=False):
        part.step(batch)
    part.save()
    resumed = Trainer(images(), TINY, tmp_path / "part", "noise")
    assert resumed.images_seen == 16
    resumed.run(QUIET)
    for name, value in whole.average.items():
        assert torch.allclose(value, resumed.average[name], atol=1e-6), name
    with pytest.raises(ValueError, match="seed=0, not 1"):
        Trainer(images(), replace(TINY, seed=1), tmp_path / "part", "noise")


def test_exported_weights_load_and_have_a_card(tmp_path: Path) -> None:
    trainer = Trainer(images(), TINY, tmp_path, "noise")
    trainer.run(QUIET)
    trainer.export(tmp_path / "own.safetensors", "abc")
    network = load_flow(str(tmp_path / "own.safetensors"))
    assert torch.allclose(
        network.state_dict()["head.weight"], trainer.average["head.weight"], atol=1e-3
    )
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "own.safetensors").values())
    card = (tmp_path / "own.md").read_text()
    assert "images seen: 48" in card
    assert "seed: 0" in card


def test_training_images_are_read_in_order_and_broken_ones_counted(tmp_path: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    mosaic = tiles.reshape(2, 3, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 24, 3)
    Image.fromarray(mosaic).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    loaded, broken = load_images(tmp_path, "mosaic", size=8)
    assert broken == 1
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), tiles)
    np.save(tmp_path / "c.npy", tiles)
    assert torch.equal(load_images(tmp_path / "c.npy", size=8)[0], loaded)
    with pytest.raises(ValueError, match="needed: uint8"):
        load_images(tmp_path / "c.npy", size=16)
    assert load_images(tmp_path, "images", size=8)[0].shape == (1, 3, 8, 8)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no readable image .*1 broken"):
        load_images(tmp_path)

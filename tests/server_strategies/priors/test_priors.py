"""Priors: hand-computed penalties, and a training that resumes."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.denoising import denoising_table, evaluate_denoising, write_card
from fl_app.commands.main import app
from fl_app.config import AttackConfig, PriorConfig
from fl_app.data import ImageSet
from fl_app.protocol import DatasetInfo, LocalTraining
from server_strategies.attacks.run import run_attack
from server_strategies.priors import checkpoint
from server_strategies.priors.checkpoint import load_checkpoint, save_checkpoint
from server_strategies.priors.flow import FlowPrior, denoise, fit, load_flow, unfit
from server_strategies.priors.images import load_images
from server_strategies.priors.networks import NETWORKS, SelfAttention, create_network
from server_strategies.priors.tiles import Tiled, tile_starts
from server_strategies.priors.total_variation import TotalVariation
from server_strategies.priors.training import (
    Trainer,
    TrainingSettings,
    draw_times,
    flow_matching_loss,
    sample,
)

QUIET = Console(quiet=True)
TINY = TrainingSettings(images=48, batch_size=8, warmup=2)


class Constant(nn.Module):
    """A velocity that is the same everywhere, with one parameter to train."""

    multiple = 4

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.value.expand_as(x)


def test_total_variation_is_its_formula() -> None:
    image = torch.tensor([[[[0.0, 0.5], [1.0, 1.0]]]])
    # across: |0.5| and |0|, mean 0.25; down: |1| and |0.5|, mean 0.75; std 0.5 doubles both
    assert TotalVariation(0.1, (0.5,))(image, 0.0).item() == pytest.approx(0.1 * (0.5 + 1.5) / 2)


def test_the_denoiser_penalty_is_its_formula() -> None:
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


class Counting(Constant):
    """Notes how many images each of its calls had."""

    def __init__(self) -> None:
        super().__init__(0.3)
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x, t)


def test_the_denoised_image_is_held_between_runs_of_the_network() -> None:
    network, generator = Counting(), torch.Generator().manual_seed(5)
    prior = FlowPrior(network, 2.0, "denoiser", 0.8, 0.9, generator, every=3)
    candidates = torch.rand((5, 2, 3, 8, 8))
    penalties = [prior(images, k / 5).item() for k, images in enumerate(candidates)]
    assert network.calls == [2, 2]
    noise = torch.Generator().manual_seed(5)
    for k, ran in enumerate((0, 0, 0, 3, 3)):
        t, x, x_ran = 0.8 + 0.1 * ran / 5, 2 * candidates[k] - 1, 2 * candidates[ran] - 1
        if k == ran:
            e = torch.randn(x.shape, generator=noise)
        denoised = t * x_ran + (1 - t) * e + (1 - t) * 0.3
        assert penalties[k] == pytest.approx(2 * (x - denoised).square().mean().item(), rel=1e-5)


def test_the_denoised_image_is_the_mean_over_draws() -> None:
    network, generator = Counting(), torch.Generator().manual_seed(5)
    prior = FlowPrior(network, 1.0, "denoiser", 0.8, 0.8, generator, draws=4)
    images = torch.rand((2, 3, 8, 8))
    penalty = prior(images, 0.0).item()
    assert network.calls == [8]
    noise = torch.randn((4, 2, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    x = 2 * images - 1
    residual = x - (0.8 * x + 0.2 * noise.mean(0) + 0.2 * 0.3)
    assert penalty == pytest.approx(residual.square().mean().item(), rel=1e-5)


def test_many_images_are_denoised_in_parts() -> None:
    network, generator = Counting(), torch.Generator().manual_seed(5)
    FlowPrior(network, 1.0, "denoiser", 0.8, 0.8, generator)(torch.rand((130, 3, 4, 4)), 0.0)
    assert network.calls == [128, 2]


@pytest.mark.parametrize("mode", ["denoiser", "velocity"])
def test_the_last_iterations_are_without_the_flow_prior(mode: str) -> None:
    network = Counting()
    prior = FlowPrior(network, 1.0, mode, 0.8, 0.9, torch.Generator(), polish=0.25)
    images = torch.rand((1, 3, 8, 8), requires_grad=True)
    assert prior(images, 0.74).item() > 0
    penalty = prior(images, 0.75)
    assert penalty.item() == 0
    assert torch.autograd.grad(penalty, images)[0].abs().max() == 0
    assert network.calls == [1]


class Edges(nn.Module):
    """A velocity that is what a 3x3 mean leaves of an image: it looks at neighbours."""

    multiple, size = 8, 16

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Size] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(x.shape)
        return x - nn.functional.avg_pool2d(x, 3, stride=1, padding=1)


@pytest.mark.parametrize("mode", ["denoiser", "velocity"])
def test_a_greyscale_image_has_the_mean_of_its_channels_gradients(mode: str) -> None:
    network = create_network("compact")
    nn.init.normal_(network.tail.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    grey = torch.rand((2, 1, 8, 8), requires_grad=True)
    colour = grey.detach().expand(-1, 3, -1, -1).clone().requires_grad_()
    gradients = []
    for images in (grey, colour):
        prior = FlowPrior(network, 2.0, mode, 0.8, 0.9, torch.Generator().manual_seed(5))
        gradients.append(torch.autograd.grad(prior(images, 0.5), images)[0])
    assert gradients[0].abs().max() > 0
    # The penalty is a mean over pixels, of which the colour image has three times as many.
    summed = gradients[1].sum(1, keepdim=True)
    torch.testing.assert_close(gradients[0], summed, rtol=1e-4, atol=1e-8)


def test_greyscale_images_can_be_attacked_and_ggl_says_why_not() -> None:
    info = DatasetInfo(10, (1, 12, 12), (0.4,), (0.3,))
    pixels = torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8)
    case = Case(LocalTraining("sgd", lr=0.01, local_steps=2), AttackConfig("flow_matching", 2))
    images = ImageSet(pixels, torch.arange(8))
    observation, knowledge, _ = draw_client(case, images, info, seed=0)
    found = run_attack(observation, knowledge, case.attack, PriorConfig(), seed=0)
    assert found.images.shape == (2, 1, 12, 12) and found.images.isfinite().all()
    with pytest.raises(ValueError, match=r"takes images \(N, 3, H, W\).*got \(2, 1, 12, 12\)"):
        run_attack(observation, knowledge, AttackConfig("ggl", 2), PriorConfig(), seed=0)


def test_sides_that_do_not_fit_are_reflected_and_cut_off_again() -> None:
    network = Edges()
    images = torch.rand((2, 3, 13, 12))
    prior = FlowPrior(network, 1.0, "velocity", 0.9, 0.9, torch.Generator())
    penalty = prior(images, 0.0).item()
    assert network.calls == [(2, 3, 16, 16)]
    x = np.pad(2 * images.numpy() - 1, ((0, 0), (0, 0), (1, 2), (2, 2)), mode="reflect")
    v = Edges()(torch.from_numpy(x), torch.ones(2))[..., 1:14, 2:14]
    assert penalty == pytest.approx(v.square().mean().item(), rel=1e-5)
    for shape in [(1, 1, 28, 28), (1, 3, 5, 9)]:  # what comes back has the image's shape
        for channels in (shape[1], 3):
            fitted = fit(torch.rand(shape), 8)
            assert fitted.shape[1] == 3 and not fitted.shape[2] % 8 and not fitted.shape[3] % 8
            assert unfit(fitted, channels, *shape[2:]).shape == (1, channels, *shape[2:])
    grey = torch.rand((1, 1, 28, 28))
    torch.testing.assert_close(unfit(fit(grey, 8), 1, 28, 28), grey)


def test_tiles_cover_an_image_and_overlap() -> None:
    for shift in range(16):
        starts = tile_starts(64, 32, shift)
        assert starts[0] == 0 and starts[-1] == 32
        assert all(0 < b - a <= 16 for a, b in pairwise(starts))
    assert tile_starts(32, 32, 7) == [0] and tile_starts(40, 32, 0) == [0, 8]


def test_a_tiled_velocity_is_the_whole_ones_where_no_tile_ends() -> None:
    network, x, t = Edges(), torch.randn((2, 3, 40, 16)), torch.ones(2)
    tiled = Tiled(network, torch.Generator().manual_seed(0))
    found = tiled(x, t)
    assert set(network.calls) == {(2, 3, 16, 16)}
    # A velocity of its pixel alone is the same in every tile; an image of the size is one tile.
    torch.testing.assert_close(Tiled(Pixelwise(), torch.Generator())(x, t), 0.3 * x)
    small = x[..., :16, :]
    torch.testing.assert_close(tiled(small, t), network(small, t))
    # Seams move: two calls differ, each from the whole at the tiles' edges only.
    again = tiled(x, t)
    assert not torch.equal(found, again)
    whole = network(x, t)
    rows = (found - whole).abs().amax(dim=(0, 1, 3)) > 1e-5
    assert 0 < rows.sum() <= 2 * 5 - 2 and not rows[[0, -1]].any()  # five tiles' inner edges


class Pixelwise(Edges):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x


def test_the_prior_takes_large_images_in_tiles_where_asked() -> None:
    images, shapes = torch.rand((1, 3, 32, 32)), []
    for tiles in (False, True):
        network = Edges()
        prior = FlowPrior(network, 1.0, "denoiser", 0.8, 0.8, torch.Generator(), tiles=tiles)
        assert prior(images, 0.0).isfinite()
        shapes.append(network.calls)
    assert shapes[0] == [(1, 3, 32, 32)] and set(shapes[1]) == {(1, 3, 16, 16)}


def test_flow_prior_refuses_what_it_cannot_do() -> None:
    def prior(mode: str = "denoiser", t_end: float = 0.9, **options: float) -> FlowPrior:
        return FlowPrior(Constant(0.0), 1.0, mode, 0.8, t_end, torch.Generator(), **options)

    with pytest.raises(ValueError, match="allowed: denoiser, velocity"):
        prior(mode="magic")
    with pytest.raises(ValueError, match=r"t_end is 1\.5"):
        prior(t_end=1.5)
    for value in (0, 1.5):
        with pytest.raises(ValueError, match=f"every is {value}; allowed: a whole number from 1"):
            prior(every=value)
        with pytest.raises(ValueError, match=f"draws is {value}; allowed: a whole number from 1"):
            prior(draws=value)
    for name in ("every", "draws"):
        with pytest.raises(ValueError, match=f"{name} is 2; allowed with mode velocity: 1"):
            prior(mode="velocity", **{name: 2})
    with pytest.raises(ValueError, match="polish is 1; allowed: from 0, below 1"):
        prior(polish=1)
    for shape in [(1, 2, 8, 8), (3, 8, 8), (1, 3, 1, 8)]:
        with pytest.raises(ValueError, match="the flow prior takes images"):
            prior()(torch.rand(shape), 0.0)


@pytest.mark.parametrize(
    ("name", "parameters", "gigaflops"), [("compact", 1.6e6, 0.34), ("unet64", 6.2e6, 3.17)]
)
def test_networks_have_their_published_size(name: str, parameters: float, gigaflops: float) -> None:
    network = create_network(name)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn((1, 3, 32, 32)), torch.rand(1))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gigaflops, rel=0.01)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_any_multiple_and_train_on_no_others(name: str) -> None:
    network = create_network(name)
    prior = FlowPrior(network, 1.0, "denoiser", 0.8, 0.9, torch.Generator())
    for side in (8, 64):
        x = torch.randn((2, 3, side, side))
        assert network(x, torch.rand(2)).shape == x.shape
        assert prior(x, 0.0).isfinite()
    with pytest.raises(ValueError, match="divisible by 4, got"):
        odd = torch.zeros((4, 3, 34, 32), dtype=torch.uint8)
        Trainer(odd, replace(TINY, network=name), Path("nowhere"), "zeros")


def test_attention_is_its_formula() -> None:
    layer = SelfAttention(128)
    nn.init.normal_(layer.out.weight, std=0.1)
    x = torch.randn((2, 128, 2, 3))
    query, key, value = layer.qkv(layer.norm(x)).chunk(3, dim=1)
    expected = x.clone()
    for image in range(2):
        heads = []
        for head in (slice(0, 64), slice(64, 128)):
            q, k, v = (part[image, head].flatten(1).T for part in (query, key, value))  # (6, 64)
            heads.append(((q @ k.T / 8).softmax(dim=1) @ v).T)
        mixed = torch.cat(heads).unflatten(1, (2, 3))
        expected[image] += layer.out(mixed[None])[0]
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are not shipped"):
        load_flow("nonsense")
    with pytest.raises(ValueError, match=r"nonsense\.safetensors is no file"):
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
    save_file({"a": torch.zeros(1)}, other, metadata={"network": "compact", "image_size": "33"})
    with pytest.raises(ValueError, match="image_size is '33'; allowed: a multiple of 4"):
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


class ToOneImage(nn.Module):
    """The exact velocity towards a data set of one image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.image - x) / (1 - t[:, None, None, None])


def test_the_exact_velocity_samples_and_denoises_to_the_data() -> None:
    image = torch.rand((3, 8, 8)) * 2 - 1
    network, generator = ToOneImage(image), torch.Generator().manual_seed(0)
    sampled = sample(network, 3, steps=7, generator=generator, size=8)
    assert torch.allclose(sampled, ((image + 1) / 2).expand(3, 3, 8, 8), atol=1e-6)
    noisy = 0.6 * image + 0.4 * torch.randn((2, 3, 8, 8))
    assert torch.allclose(denoise(network, noisy, 0.6), image.expand(2, 3, 8, 8), atol=1e-6)


def images(count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1_000_000)


def half_trained(folder: Path) -> Trainer:
    trainer = Trainer(images(), TINY, folder, "noise")
    for _ in range(3):
        trainer.step()
    trainer.save()
    return trainer


def test_a_killed_training_resumes(tmp_path: Path, small_shards: None) -> None:
    whole = Trainer(images(), TINY, tmp_path / "whole", "noise")
    whole.run(QUIET)
    half_trained(tmp_path / "part")
    # What a training needs is in the checkpoint: moved, it goes on elsewhere.
    shutil.copytree(tmp_path / "part" / "checkpoint", tmp_path / "moved" / "checkpoint")
    assert len(list((tmp_path / "moved" / "checkpoint").glob("*.safetensors"))) > 10
    resumed = Trainer(images(), TINY, tmp_path / "moved", "noise")
    assert resumed.images_seen == 24
    resumed.run(QUIET)
    assert resumed.loss == whole.loss
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    for change, words in [({"seed": 1}, "seed=0, not 1"), ({"batch_size": 4}, "batch_size=8")]:
        with pytest.raises(ValueError, match=words):
            Trainer(images(), replace(TINY, **change), tmp_path / "part", "noise")
    longer = Trainer(images(), replace(TINY, images=96), tmp_path / "part", "noise")
    assert longer.progress == 24 / 96


def test_a_training_begins_with_other_weights(tmp_path: Path) -> None:
    half_trained(tmp_path / "first").export(tmp_path / "first.safetensors", "abc")
    start = replace(TINY, start=str(tmp_path / "first.safetensors"))
    trainer = Trainer(images(), start, tmp_path / "second", "noise")
    for name, value in load_file(start.start).items():
        assert torch.equal(trainer.weights[name], value.float()), name
        assert torch.equal(trainer.average[name], value.float()), name
    trainer.step()
    trainer.save()
    trainer.export(tmp_path / "second.safetensors", "abc")
    card = (tmp_path / "second.md").read_text()
    assert "began with: first, which had seen 24 images" in card and "images seen: 8" in card
    with pytest.raises(ValueError, match=r"trained with start=.*first\.safetensors, not ;"):
        Trainer(images(), TINY, tmp_path / "second", "noise")
    with pytest.raises(ValueError, match="are of the network 'compact', not of 'unet64'"):
        Trainer(images(), replace(start, network="unet64"), tmp_path / "third", "noise")


def test_a_checkpoint_of_another_kind_of_device_draws_new_numbers(tmp_path: Path) -> None:
    trainer = half_trained(tmp_path)
    file = tmp_path / "checkpoint" / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "device": "cuda"}))
    resumed = Trainer(images(), TINY, tmp_path, "noise")
    assert resumed.generator.get_state().equal(torch.Generator().manual_seed(3).get_state())
    assert not resumed.generator.get_state().equal(trainer.generator.get_state())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    def save(value: float) -> None:
        save_checkpoint(tmp_path, {"a": torch.tensor(value)}, {})

    def saved() -> float | None:
        found = load_checkpoint(tmp_path)
        return None if found is None else found[0]["a"].item()

    done: list[Path] = []
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise Killed
        done.append(self)
        return rename(self, target)

    assert saved() is None
    save(1.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        save(2.0)
    assert saved() == 1
    save(3.0)
    assert saved() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, small_shards: None) -> None:
    half_trained(tmp_path)
    shard = tmp_path / "checkpoint" / "tensors-001.safetensors"
    whole = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(whole[:-1]), shard.unlink):
        damage()
        with pytest.raises(ValueError, match=r"can't be resumed: .*tensors-001"):
            Trainer(images(), TINY, tmp_path, "noise")


def test_a_training_leaves_a_log_and_samples(tmp_path: Path) -> None:
    Trainer(images(), TINY, tmp_path, "noise").run(QUIET, report_seconds=0, reports_per_grid=4)
    log = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [line["images"] for line in log] == [8, 16, 24, 32, 40, 48, 48]
    grids = sorted(tmp_path.glob("samples-*.png"))
    assert [grid.stem for grid in grids] == ["samples-000000032", "samples-000000048"]
    with Image.open(grids[0]) as grid:
        assert grid.size == (48, 48)  # 6 x 6 images of 8 x 8
    with pytest.raises(ValueError, match="1 training images; allowed: 2 or more"):
        Trainer(images(1), TINY, tmp_path, "noise")


def test_exported_weights_load_and_have_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.chdir(tmp_path)
    command = ["prior", "evaluate", "own.safetensors", "--dataset", "photos", "--images", "2"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    evaluated = (tmp_path / "own.md").read_text()
    assert evaluated.startswith(card)
    assert "2 of" in evaluated and "| 0.4 |" in evaluated


def test_denoising_is_measured_and_put_into_the_card(tmp_path: Path) -> None:
    ramp = torch.linspace(20, 235, 32).expand(3, 3, 32, 32).byte()
    rows = evaluate_denoising("compact", ramp, 2)
    for row in rows:
        assert min(row.flow) > max(row.noisy)
        assert min(row.non_local_means) > max(row.noisy)
    # The noise of sigma 0.05 is hardly clipped: 10 log10(1 / 0.05^2) = 26.02 dB.
    assert rows[0].noisy == pytest.approx((26.02, 26.02), abs=0.4)
    assert rows[0].tiles == () and denoising_table(rows).columns[-1].header == "flow dB"
    (large, *_) = evaluate_denoising("compact", ramp.repeat(1, 1, 1, 2), 1)
    assert min(large.tiles) > max(large.noisy) and len(large.cells()) == 5
    card = tmp_path / "own.md"
    card.write_text("# own\n\n- seed: 0\n")
    write_card(card, rows, "2 images", "old command", "abc")
    write_card(card, rows, "2 images", "new command", "abc")
    text = card.read_text()
    assert text.startswith("# own\n\n- seed: 0\n\n## Denoising\n")
    assert "old command" not in text
    assert text.count("| 0.05 |") == 1
    with pytest.raises(ValueError, match="images is 4; allowed: 1 to 3"):
        evaluate_denoising("compact", ramp, 4)


TILES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def test_training_images_are_read_in_order_and_broken_ones_counted(tmp_path: Path) -> None:
    mosaic = TILES.reshape(2, 3, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 24, 3)
    Image.fromarray(mosaic).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    (tmp_path / "c.jpg").write_bytes(b"")
    loaded, broken = load_images(str(tmp_path), "mosaic", size=8)
    assert broken == 2
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), TILES)
    with pytest.raises(ValueError, match="no mosaic of 5 x 5 tiles"):
        load_images(str(tmp_path), "mosaic", size=5)
    for size in (8, 64):  # smaller and larger than the image
        assert load_images(str(tmp_path), "images", size)[0].shape == (1, 3, size, size)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no readable image .*2 broken"):
        load_images(str(tmp_path))
    for source in (tmp_path / "nowhere", tmp_path / "b.png"):
        with pytest.raises(ValueError, match=r"no folder, no \.npy file and no name"):
            load_images(str(source))


def test_training_images_from_an_array(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    np.save(file, TILES)
    loaded = load_images(str(file), size=8)[0]
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), TILES)
    with pytest.raises(ValueError, match=r"uint8 \(6, 8, 8, 3\); needed: uint8 \(N, 16, 16, 3\)"):
        load_images(str(file), size=16)
    file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="no array of numbers in NumPy's format"):
        load_images(str(file), size=8)


def test_training_images_from_a_folder_of_parquet_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cells: list[dict[str, bytes | None] | None] = []
    for tile in TILES:
        buffer = io.BytesIO()
        Image.fromarray(tile).save(buffer, "png")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    cells[2], cells[4] = {"bytes": b"broken", "path": None}, None
    features = datasets.Features({"n": datasets.Value("int64"), "picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"n": list(range(6)), "picture": cells}, features=features)
    folder = tmp_path / "data"
    folder.mkdir()
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    loaded, broken = load_images(str(folder), size=8)
    assert broken == 2
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), TILES[[0, 1, 3, 5]])
    rows.select_columns(["n"]).to_parquet(folder / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="has no column of images; its columns: n"):
        load_images(str(folder), size=8)
    (folder / "train-00000-of-00001.parquet").rename(folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="no train split from the folder"):
        load_images(str(folder), size=8)

"""Training a flow prior: `flowleak prior train`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fl_app.util.files import whole_file, write_text
from fl_app.util.progress import progress_bar
from server_strategies.priors.checkpoint import load_checkpoint, save_checkpoint
from server_strategies.priors.flow import generate, load_flow
from server_strategies.priors.networks import check_shape, create_network
from server_strategies.priors.places import weights_name
from server_strategies.priors.settings import TrainingSettings

VALIDATION_TIMES = (0.2, 0.5, 0.8, 0.9, 0.95)
GRID = 6  # rows and columns of a grid of samples
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def draw_times(count: int, focus: float, generator: torch.Generator) -> Tensor:
    """Draw flow times, a share `focus` of them from [0.6, 1]; shape (count,)."""
    times, choice = torch.rand((2, count), generator=generator, device=generator.device)
    return torch.where(choice < focus, 0.6 + 0.4 * times, 0.6 * times)


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], clean: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return the flow-matching loss with straight paths, one value an image.

    ``|v(t x1 + (1 - t) x0, t) - (x1 - x0)|^2``, mean over pixels (the paper,
    eq. 2 and 3; Lipman et al., 2023).

    Parameters
    ----------
    velocity : callable
        v(x_t, t), a network.
    clean, noise : Tensor, shape (batch, C, H, W)
        x1 in [-1, 1] and x0 from N(0, I).
    t : Tensor, shape (batch,)

    Returns
    -------
    Tensor, shape (batch,)
    """
    x_t = torch.lerp(noise, clean, t[:, None, None, None])
    return F.mse_loss(velocity(x_t, t), clean - noise, reduction="none").mean(dim=(1, 2, 3))


@torch.no_grad()
def sample(
    network: nn.Module, count: int, steps: int, generator: torch.Generator, size: int = 32
) -> Tensor:
    """Generate images from noise, see `generate`.

    Parameters
    ----------
    network : nn.Module
        The velocity v(x_t, t), on the generator's device.
    count : int
        Images to generate, in one batch.
    steps : int
        Euler steps.
    generator : torch.Generator
        Draws the noise.
    size : int
        Height and width in pixels.

    Returns
    -------
    Tensor, shape (count, 3, size, size)
        In [0, 1].
    """
    device = generator.device
    x = torch.randn((count, 3, size, size), generator=generator, device=device)
    return ((generate(network, x, steps) + 1) / 2).clamp(0, 1)


class Trainer:
    """One training, resumable: all that a step changes is in the checkpoint.

    On a CPU a resumed training ends bit for bit as an uninterrupted one. On
    CUDA the network is compiled and works in bfloat16 where that is safe;
    images, noise and losses stay on the device, so that a step never waits for
    it.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, 3, H, W)
        Two or more. The last 2% (at most 1,000) are kept for validation.
    settings : TrainingSettings
    folder : Path
        Where ``checkpoint/``, ``progress.jsonl`` and ``samples-*.png`` are
        kept; a checkpoint found there is resumed.
    source : str
        What the images are, for the model card.

    Raises
    ------
    ValueError
        If the network can't take such images, the weights to start with are not
        its, or the checkpoint found can't be read or was made with another
        network, seed, batch size or start.
    """

    def __init__(
        self, images: Tensor, settings: TrainingSettings, folder: Path, source: str
    ) -> None:
        self.settings, self.folder, self.source = settings, folder, source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if len(images) < 2:
            raise ValueError(f"{len(images)} training images; allowed: 2 or more")
        held_out = min(1000, max(1, len(images) // 50))
        self.validation = images[-held_out:]
        self.images = images[:-held_out].to(self.device)
        torch.manual_seed(settings.seed)
        self.generator = torch.Generator(self.device).manual_seed(settings.seed)
        network = self._created().to(self.device)
        check_shape(network, images.shape)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.backends.cudnn.benchmark = True  # batches are all of one shape
        self.velocity: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(self.network) if on_cuda else self.network
        )
        # The weights themselves, which steps change in place; their average.
        self.weights = self.network.state_dict()
        self.average = {k: v.clone() for k, v in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), fused=on_cuda
        )
        self.steps, self.seconds = 0, 0.0
        self.loss = torch.tensor(math.nan, device=self.device)  # of about the last 100 steps
        self._resume()

    @property
    def images_seen(self) -> int:
        """Images seen so far, with repetitions."""
        return self.steps * self.settings.batch_size

    @property
    def progress(self) -> float:
        """Share of the training done, by images or by minutes, in [0, 1]."""
        done = self.images_seen / self.settings.images
        if self.settings.minutes:
            done = max(done, self.seconds / (60 * self.settings.minutes))
        return min(done, 1.0)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch: images in [-1, 1] (flipped at random), noise and flow times."""
        count, device = self.settings.batch_size, self.device
        picks = torch.randint(len(self.images), (count,), generator=self.generator, device=device)
        flips = torch.rand((count, 1, 1, 1), generator=self.generator, device=device) < 0.5
        pixels = self.images[picks]
        clean = torch.where(flips, pixels.flip(-1), pixels).float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=self.generator, device=device)
        t = draw_times(count, self.settings.focus, self.generator)
        layout = torch.channels_last
        return clean.contiguous(memory_format=layout), noise.contiguous(memory_format=layout), t

    def step(self) -> None:
        """Make one optimiser step."""
        warm = min(1.0, (self.steps + 1) / self.settings.warmup)
        rate = self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clean, noise, t = self.draw()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = flow_matching_loss(self.velocity, clean, noise, t).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        # Early averages decay faster, so that they do not keep the initial weights.
        decay = min(self.settings.ema, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)([*self.average.values()], [*self.weights.values()], 0)
        loss = loss.detach().float()
        self.loss = torch.where(self.loss.isnan(), loss, self.loss.lerp(loss, 0.01))

    def averaged(self) -> nn.Module:
        """Return a network with the averaged weights."""
        network = create_network(self.settings.network).to(self.device).requires_grad_(False)
        network.load_state_dict(self.average)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the averaged network's flow-matching loss by flow time."""
        generator = torch.Generator().manual_seed(1)  # the same noise on every device
        network = self.averaged()
        clean = self.validation[:256].to(self.device).float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        losses = {}
        for time_ in VALIDATION_TIMES:
            t = torch.full((len(clean),), time_, device=self.device)
            losses[f"{time_:g}"] = flow_matching_loss(network, clean, noise, t).mean().item()
        return losses

    def run(self, console: Console, report_seconds: float = 180, reports_per_grid: int = 5) -> None:
        """Train to the end of the budget.

        Parameters
        ----------
        console : Console
            Shows a progress bar.
        report_seconds : float
            After so many seconds a line joins ``progress.jsonl`` and the
            checkpoint is written, as at the end.
        reports_per_grid : int
            After so many reports a grid of samples is drawn, as at the end.
        """
        reports, start = 0, self.steps
        last = reported = shown = time.monotonic()
        with progress_bar(console) as bar:
            task = bar.add_task("training", total=1.0)
            while self.progress < 1:
                self.step()
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                if now - shown >= 1:
                    # Reading the loss waits for the device.
                    words = f"{self.images_seen / self.seconds:.0f}/s, loss {self.loss.item():.4f}"
                    description = f"{self.images_seen:,} images, {words}"
                    bar.update(task, completed=self.progress, description=description)
                    shown = now
                if now - reported >= report_seconds:
                    reports += 1
                    self._report(grid=reports % reports_per_grid == 0)
                    reported = time.monotonic()
        if self.steps > start:
            self._report(grid=True)

    def _report(self, grid: bool) -> None:
        line = {
            "images": self.images_seen,
            "seconds": round(self.seconds),
            "loss": round(self.loss.item(), 5),
            "validation": {k: round(v, 5) for k, v in self.validate().items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if grid:
            self._draw_grid()
        self.save()

    def _draw_grid(self) -> None:
        """Write GRID x GRID generated images to ``samples-IMAGES_SEEN.png``."""
        size = self.images.shape[-1]
        # The same noise each time: grids of one training show the same images getting better.
        generator = torch.Generator(self.device).manual_seed(1)
        network = self.averaged()
        images = sample(network, GRID * GRID, steps=50, generator=generator, size=size).cpu()
        rows = images.unflatten(0, (GRID, GRID)).permute(0, 3, 1, 4, 2)
        pixels = (255 * rows.reshape(GRID * size, GRID * size, 3)).round().byte()
        with whole_file(self.folder / f"samples-{self.images_seen:09}.png") as temporary:
            Image.fromarray(pixels.numpy()).save(temporary)

    def save(self) -> None:
        """Write the checkpoint that a killed training resumes from; after a first step."""
        tensors = {"generator": self.generator.get_state()}
        tensors |= {f"network/{k}": v for k, v in self.weights.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        for name, parameter in self.network.named_parameters():
            kept = self.optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": kept[moment] for moment in MOMENTS}
        facts = {
            "settings": asdict(self.settings),
            "device": self.device.type,
            "steps": self.steps,
            "seconds": self.seconds,
            "loss": self.loss.item(),
        }
        save_checkpoint(self.folder, tensors, facts)

    def _created(self) -> nn.Module:
        """Return the network to begin with, and set `began`, its description for the card."""
        network, start = create_network(self.settings.network), self.settings.start
        self.began = "random weights"
        if start:
            other = load_flow(start)
            facts: dict[str, str] = other.facts  # type: ignore[assignment]
            if facts["network"] != self.settings.network:
                raise ValueError(
                    f"the weights {start!r} are of the network {facts['network']!r}, "
                    f"not of {self.settings.network!r}"
                )
            network.load_state_dict(other.state_dict())
            seen = facts.get("images_seen", "an unknown number of")
            self.began = f"{weights_name(start)}, which had seen {seen} images"
        return network

    def _resume(self) -> None:
        """Go on from the folder's checkpoint, if there is one."""
        found = load_checkpoint(self.folder)
        if found is None:
            return
        tensors, facts = found
        for name in ("network", "seed", "batch_size", "start"):
            # Settings that an older checkpoint lacks had their default then.
            before = facts["settings"].get(name, getattr(TrainingSettings, name))
            now = getattr(self.settings, name)
            if before != now:
                raise ValueError(
                    f"the checkpoint in {self.folder} was trained with {name}={before}, not {now}; "
                    "choose another folder to start again"
                )
        self.network.load_state_dict({k: tensors[f"network/{k}"] for k in self.average})
        for name, value in self.average.items():
            value.copy_(tensors[f"average/{name}"])
        state = self.optimizer.state_dict()
        for index, (name, parameter) in enumerate(self.network.named_parameters()):
            kept = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
            for moment in MOMENTS[1:]:  # in the parameter's layout, as the optimiser made them
                kept[moment] = torch.empty_like(parameter).detach().copy_(kept[moment])
            state["state"][index] = kept
        self.optimizer.load_state_dict(state)
        self.steps, self.seconds = facts["steps"], facts["seconds"]
        self.loss.fill_(facts["loss"])
        if facts["device"] == self.device.type:
            self.generator.set_state(tensors["generator"])
        else:
            # Generators of a CPU and of CUDA can't take each other's state.
            self.generator.manual_seed(self.settings.seed + self.steps)

    def export(self, path: Path, commit: str) -> None:
        """Write the averaged weights (fp16) and their model card beside them.

        Parameters
        ----------
        path : Path
            The ``.safetensors`` file; the card is ``path`` with ``.md``.
        commit : str
            The code's version.
        """
        losses = self.validate()
        facts = {
            "network": self.settings.network,
            "image size": str(self.images.shape[-1]),
            "data": self.source,
            "training images": f"{len(self.images):,}",
            "began with": self.began,
            "images seen": f"{self.images_seen:,}",
            "steps": f"{self.steps:,} of batch {self.settings.batch_size}",
            "seconds": f"{self.seconds:.0f} on {self.device.type}",
            "seed": str(self.settings.seed),
            "flow times": f"{self.settings.focus:.0%} in [0.6, 1]",
            "training loss": f"{self.loss.item():.4f}",
            "code": commit,
        }
        half = {k: v.half().contiguous().cpu() for k, v in self.average.items()}
        with whole_file(path) as temporary:
            save_file(half, temporary, metadata={k.replace(" ", "_"): v for k, v in facts.items()})
        card = [f"# {path.stem}: a flow-matching prior for small natural images", ""]
        card += [f"- {name}: {value}" for name, value in facts.items()]
        card += ["", "Validation loss by flow time t (held-out images; 1 is clean):", ""]
        card += ["| t | loss | denoised PSNR (dB) |", "|---|---|---|"]
        for t, loss in losses.items():
            # D(x_t, t) - x1 = (1 - t) (v - (x1 - x0)), and pixels span 2.
            psnr = 10 * math.log10(4 / ((1 - float(t)) ** 2 * loss))
            card.append(f"| {t} | {loss:.4f} | {psnr:.2f} |")
        write_text(path.with_suffix(".md"), "\n".join(card) + "\n")

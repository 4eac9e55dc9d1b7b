"""Training a flow prior: `flowleak prior train`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.files import whole_file, write_text
from fl_app.progress import progress_bar
from server_strategies.priors.networks import create_network

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
VALIDATION_TIMES = (0.2, 0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class TrainingSettings:
    """How a flow prior is trained.

    Attributes
    ----------
    network : str
        A name in `networks.NETWORKS`.
    images : int
        Images to see in all; the learning rate falls by cosine towards it.
    minutes : float
        Training stops after so many minutes, over all resumptions, with its
        learning rate fallen as far as by `images`. 0: no limit.
    batch_size : int
        Images a step.
    learning_rate : float
        Peak rate of AdamW, reached after `warmup` steps.
    warmup : int
        Steps of linear warm-up.
    ema : float
        Decay of the exponential moving average of the weights.
    focus : float
        Share of the flow times drawn from [0.6, 1], where attacks use the
        network; the others come from [0, 0.6].
    seed : int
    """

    network: str = "compact"
    images: int = 1_500_000
    minutes: float = 0.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 300
    ema: float = 0.999
    focus: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("images", 1, math.inf),
            ("minutes", 0, math.inf),
            ("batch_size", 1, math.inf),
            ("learning_rate", 0, 1),
            ("ema", 0, 1),
            ("focus", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; allowed: {low} to {high}")


def load_images(source: Path, layout: str = "images", size: int = 32) -> tuple[Tensor, int]:
    """Load training images into memory.

    Parameters
    ----------
    source : Path
        A folder of images, or an ``.npy`` file of uint8 (N, size, size, 3).
    layout : {"images", "mosaic"}
        Whether a file of the folder is one image (cropped to its centre square
        and resized) or a grid of `size` x `size` tiles, row by row.
    size : int
        Height and width in pixels.

    Returns
    -------
    images : Tensor of uint8, shape (N, 3, size, size)
    broken : int
        Files that could not be read, which were skipped.

    Raises
    ------
    ValueError
        If the source holds no usable image, or arrays of another shape.
    """
    if layout not in ("images", "mosaic"):
        raise ValueError(f"unknown layout {layout!r}; known: images, mosaic")
    if not source.exists():
        raise ValueError(f"no training images: {source} does not exist")
    if source.suffix == ".npy":
        array = np.load(source, allow_pickle=False)
        if array.dtype != np.uint8 or array.shape[1:] != (size, size, 3):
            raise ValueError(
                f"{source} holds {array.dtype} {array.shape}; needed: uint8 (N, {size}, {size}, 3)"
            )
        return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), 0
    parts, broken = [], 0
    for file in sorted(source.rglob("*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            if layout == "images":
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError):
            broken += 1
            continue
        pixels = np.asarray(image)
        rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
        if pixels.shape[:2] != (rows * size, columns * size):
            raise ValueError(f"{file} is no mosaic of {size} x {size} tiles: {pixels.shape[:2]}")
        tiles = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
        parts.append(tiles.reshape(-1, 3, size, size))
    if not parts:
        raise ValueError(f"no readable image in {source} ({broken} broken files)")
    return torch.from_numpy(np.concatenate(parts)), broken


def draw_times(count: int, focus: float, generator: torch.Generator) -> Tensor:
    """Draw flow times, a share `focus` of them from [0.6, 1]; shape (count,)."""
    times = 0.6 * torch.rand(count, generator=generator)
    late = torch.rand(count, generator=generator) < focus
    return torch.where(late, 0.6 + times * (0.4 / 0.6), times)


def flow_matching_loss(network: nn.Module, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the flow-matching loss with straight paths, one value an image.

    ``|v(t x1 + (1 - t) x0, t) - (x1 - x0)|^2``, mean over pixels (the paper,
    eq. 2 and 3; Lipman et al., 2023).

    Parameters
    ----------
    network : nn.Module
        The velocity v(x_t, t).
    clean, noise : Tensor, shape (batch, C, H, W)
        x1 in [-1, 1] and x0 from N(0, I).
    t : Tensor, shape (batch,)

    Returns
    -------
    Tensor, shape (batch,)
    """
    level = t[:, None, None, None]
    velocity = network(torch.lerp(noise, clean, level), t)
    return F.mse_loss(velocity, clean - noise, reduction="none").mean(dim=(1, 2, 3))


class Trainer:
    """One training, resumable: everything that a step changes is in `state`.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, 3, H, W)
        The last 2% (at most 1,000) are kept for validation.
    settings : TrainingSettings
    folder : Path
        Where ``checkpoint.pt`` and ``progress.jsonl`` are kept; a checkpoint
        found there is resumed.
    source : str
        What the images are, for the model card.

    Raises
    ------
    ValueError
        If the checkpoint found was made with another network or seed.
    """

    def __init__(
        self, images: Tensor, settings: TrainingSettings, folder: Path, source: str
    ) -> None:
        self.settings, self.folder, self.source = settings, folder, source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        held_out = min(1000, max(1, len(images) // 50))
        self.validation, self.images = images[-held_out:], images[:-held_out]
        torch.manual_seed(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        network = create_network(settings.network).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99)
        )
        self.steps, self.seconds, self.smooth_loss = 0, 0.0, math.nan
        if (folder / "checkpoint.pt").exists():
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

    def batches(self) -> Iterator[Tensor]:
        """Yield batches in [-1, 1], randomly flipped, without end."""
        while True:
            picks = torch.randint(
                len(self.images), (self.settings.batch_size,), generator=self.generator
            )
            flips = torch.rand(len(picks), generator=self.generator) < 0.5
            batch = self.images[picks]
            batch[flips] = batch[flips].flip(-1)
            yield batch.to(self.device).float().div_(127.5).sub_(1)

    def step(self, clean: Tensor) -> Tensor:
        """Make one optimiser step; return its mean loss, shape ()."""
        warm = min(1.0, (self.steps + 1) / self.settings.warmup)
        rate = self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        noise = torch.randn(clean.shape, generator=self.generator).to(self.device)
        t = draw_times(len(clean), self.settings.focus, self.generator).to(self.device)
        clean = clean.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = flow_matching_loss(self.network, clean, noise, t).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        # A young average forgets faster, or it would remember the start.
        decay = min(self.settings.ema, (1 + self.steps) / (10 + self.steps))
        for name, value in self.network.state_dict().items():
            self.average[name].lerp_(value.detach(), 1 - decay)
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the averaged network's flow-matching loss by flow time."""
        generator = torch.Generator().manual_seed(1)
        averaged = create_network(self.settings.network).to(self.device)
        averaged.load_state_dict(self.average)
        clean = self.validation[:256].to(self.device).float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        losses = {}
        for time_ in VALIDATION_TIMES:
            t = torch.full((len(clean),), time_, device=self.device)
            losses[f"{time_:g}"] = flow_matching_loss(averaged, clean, noise, t).mean().item()
        return losses

    def run(self, console: Console, report_every: int = 500) -> None:
        """Train to the end of the budget, with a progress bar and checkpoints."""
        with progress_bar(console) as bar:
            task = bar.add_task("training", total=1.0)
            batches, last = self.batches(), time.monotonic()
            while self.progress < 1:
                loss = self.step(next(batches)).item()
                now = time.monotonic()
                self.seconds, last = self.seconds + now - last, now
                self.smooth_loss = (
                    loss if math.isnan(self.smooth_loss) else 0.99 * self.smooth_loss + 0.01 * loss
                )
                rate = self.images_seen / max(self.seconds, 1e-9)
                bar.update(
                    task,
                    completed=self.progress,
                    description=f"{self.images_seen:,} images, {rate:.0f}/s, "
                    f"loss {self.smooth_loss:.4f}",
                )
                if self.steps % report_every == 0:
                    self._report()
                    self.save()
        self._report()
        self.save()

    def _report(self) -> None:
        line = {
            "images": self.images_seen,
            "seconds": round(self.seconds),
            "loss": round(self.smooth_loss, 5),
            "validation": {k: round(v, 5) for k, v in self.validate().items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the checkpoint that a killed training resumes from."""
        state = {
            "settings": asdict(self.settings),
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
            "smooth_loss": self.smooth_loss,
        }
        with whole_file(self.folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        for name in ("network", "seed", "batch_size"):
            before, now = state["settings"][name], getattr(self.settings, name)
            if before != now:
                raise ValueError(
                    f"{self.folder / 'checkpoint.pt'} was trained with {name}={before}, not {now}; "
                    "choose another folder to start anew"
                )
        self.network.load_state_dict(state["network"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.smooth_loss = state["smooth_loss"]

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
            "data": self.source,
            "training images": f"{len(self.images):,}",
            "images seen": f"{self.images_seen:,}",
            "steps": f"{self.steps:,} of batch {self.settings.batch_size}",
            "seconds": f"{self.seconds:.0f} on {self.device.type}",
            "seed": str(self.settings.seed),
            "flow times": f"{self.settings.focus:.0%} in [0.6, 1]",
            "training loss": f"{self.smooth_loss:.4f}",
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

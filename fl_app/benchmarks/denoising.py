"""How well a flow prior denoises, beside non-local means: `flowleak prior evaluate`.

It lies here and not beside the priors because it scores with the auditor's
metrics, which attackers' code can't import.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from skimage.restoration import denoise_nl_means
from torch import Tensor

from fl_app.audit.exposure import bounds_of
from fl_app.audit.metrics import psnr
from fl_app.util.files import write_text
from fl_app.util.intervals import with_interval
from server_strategies.priors.flow import denoise, load_flow
from server_strategies.priors.networks import check_shape
from server_strategies.priors.tiles import Tiled

SIGMAS = (0.05, 0.1, 0.2, 0.4)  # of the noise, on pixels in [0, 1]
# Cut-off of non-local means in units of sigma: what scikit-image's documentation recommends
# for its fast and its slow mode.
NLM_CUTOFFS = (0.6, 0.8)
_HEADING = "## Denoising"


@dataclass(frozen=True)
class DenoisingRow:
    """PSNR in dB of each image at one noise level, all on the same noisy images.

    Attributes
    ----------
    sigma : float
        Standard deviation of the noise, on pixels in [0, 1].
    noisy, non_local_means, flow : tuple of float
        By image: of the noisy ones, and of what either denoiser makes of them.
    tiles : tuple of float
        Of the flow in tiles of its training images' size (`Tiled`); empty where the
        images are no larger.
    """

    sigma: float
    noisy: tuple[float, ...]
    non_local_means: tuple[float, ...]
    flow: tuple[float, ...]
    tiles: tuple[float, ...] = ()

    def cells(self) -> list[str]:
        """Return the row of the table: each mean with its 95% interval."""
        columns = (self.noisy, self.non_local_means, self.flow, self.tiles)
        bounds = bounds_of("psnr")
        said = [with_interval(values, 2, bounds) for values in columns if values]
        return [f"{self.sigma:g}", *said]


def evaluate_denoising(weights: str, images: Tensor, count: int) -> list[DenoisingRow]:
    """Measure how well a flow prior removes Gaussian noise from images.

    Both denoisers know sigma, and every result is clipped to [0, 1]. On
    [-1, 1] the noise is 2 sigma, and x_t / t has noise (1 - t) / t: so
    t = 1 / (1 + 2 sigma), and D(t (2 y - 1), t) denoises y.

    Parameters
    ----------
    weights : str
        As `load_flow` takes it.
    images : Tensor of uint8, shape (N, 3, H, W)
    count : int
        How many of them to take, drawn with seed 0, as the noise is.

    Returns
    -------
    list of DenoisingRow
        By `SIGMAS`. Non-local means (Buades et al., 2005) as scikit-image has
        it, at the cut-off of `NLM_CUTOFFS` with the better mean.

    Raises
    ------
    ValueError
        If there are no such weights, they don't take such images, or there are
        not so many.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"images is {count}; allowed: 1 to {len(images)}, those of the split")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_flow(weights, device)
    check_shape(network, images.shape)
    generator = torch.Generator().manual_seed(0)
    clean = images[torch.randperm(len(images), generator=generator)[:count]].float() / 255
    networks = [network]
    if max(images.shape[-2:]) > int(network.size):  # type: ignore[arg-type]
        networks.append(Tiled(network, torch.Generator().manual_seed(0)))
    rows = []
    for sigma in SIGMAS:
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        t = 1 / (1 + 2 * sigma)
        parts = (t * (2 * noisy - 1)).split(64)
        flows = [
            torch.cat([denoise(chosen, part.to(device), t).cpu() for part in parts])
            for chosen in networks
        ]
        tried = [_non_local_means(noisy, sigma, cutoff) for cutoff in NLM_CUTOFFS]
        scores = [_scores(denoised, clean) for denoised in tried]
        columns = [_scores((flow + 1) / 2, clean) for flow in flows]
        rows.append(DenoisingRow(sigma, _scores(noisy, clean), max(scores, key=sum), *columns))
    return rows


def denoising_table(rows: list[DenoisingRow]) -> Table:
    """Return the rows as a table for a terminal."""
    table = Table(*(f"{name} dB" if place else name for place, name in enumerate(_heads(rows))))
    for row in rows:
        table.add_row(*row.cells())
    return table


def write_card(
    card: Path, rows: list[DenoisingRow], images: str, command: str, commit: str
) -> None:
    """Put the rows into a model card, in place of those that an earlier call put there.

    Parameters
    ----------
    card : Path
        The ``.md`` beside the weights; made if it is not there.
    rows : list of DenoisingRow
    images : str
        What they were measured on.
    command, commit : str
        What made the rows: the command, and the code's version.
    """
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {card.stem}\n"
    kept = re.sub(rf"\n*^{_HEADING}$.*?(?=^## |\Z)", "\n", text, flags=re.MULTILINE | re.DOTALL)
    lines = [
        _HEADING,
        "",
        f"Mean PSNR in dB, with its 95% interval, of {images} under Gaussian "
        "noise of standard deviation sigma on pixels in [0, 1]; the cut-off of scikit-image's "
        f"non-local means is the better of {NLM_CUTOFFS[0]} and {NLM_CUTOFFS[1]} sigma. "
        f"Made by `{command}`, code {commit}.",
        "",
        f"| {' | '.join(_heads(rows))} |",
        "|---" * len(_heads(rows)) + "|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    write_text(card, kept.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n")


def _heads(rows: list[DenoisingRow]) -> list[str]:
    return ["sigma", "noisy", "non-local means", "flow", "flow in tiles"][: len(rows[0].cells())]


def _non_local_means(noisy: Tensor, sigma: float, cutoff: float) -> Tensor:
    """Return the denoised images; patches and search as in scikit-image's documentation."""
    denoised = [
        denoise_nl_means(
            image.permute(1, 2, 0).numpy(), patch_size=5, patch_distance=6, h=cutoff * sigma,
            sigma=sigma, fast_mode=True, channel_axis=-1,
        )
        for image in noisy
    ]  # fmt: skip
    return torch.stack([torch.from_numpy(image) for image in denoised]).permute(0, 3, 1, 2)


def _scores(images: Tensor, clean: Tensor) -> tuple[float, ...]:
    return tuple(psnr(images.clamp(0, 1), clean).tolist())

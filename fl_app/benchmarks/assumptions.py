"""Whether the paper's assumptions on the flow hold: `flowleak prior assumptions`.

A1 (eq. 9): v(., t) is Lipschitz continuous. A2 (eq. 10): |v(x, t)| does not fall
as x moves away from the natural images, and v points back to them. What
the prior's penalty does to an image rests on both. It lies here and not beside
the priors because it looks at private images, which attackers' code can't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from fl_app.audit.metrics import assign
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import AttackConfig, PriorConfig
from fl_app.data import ImageSet
from fl_app.protocol import DatasetInfo, LocalTraining
from fl_app.util.intervals import COSINE, DISTANCE, Bounds, with_interval
from fl_app.util.markdown import markdown_table
from server_strategies.attacks.run import run_attack
from server_strategies.priors.flow import denoise, load_flow
from server_strategies.priors.networks import check_shape

TIMES = (0.8, 0.9, 0.95, 1.0)
CLIENT = LocalTraining("adam", lr=1e-3, batch_size=4, local_steps=5)
VALUES = ("|v|", "|x - D|", "cos(v, clean - x)", "cos(D - x, clean - x)")
_POWER_ITERATIONS = 10


def add_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Return images in [0, 1] under Gaussian noise, clipped to [0, 1]."""
    return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Return images blurred by a Gaussian of `sigma` pixels, cut at three sigma."""
    return torch.from_numpy(gaussian_filter(images.numpy(), sigma, axes=(2, 3), truncate=3))


def pixelate(images: Tensor, block: float, generator: torch.Generator) -> Tensor:
    """Return images whose blocks of `block` x `block` pixels have one colour, their mean."""
    return F.interpolate(F.avg_pool2d(images, int(block)), size=images.shape[-2:])


CORRUPTIONS: dict[
    str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]
] = {
    "noise, sigma of [0, 1]": (add_noise, (0.02, 0.05, 0.1, 0.2)),
    "blur, sigma in pixels": (blur, (0.5, 1.0, 2.0, 4.0)),
    "mosaic, pixels": (pixelate, (2, 4, 8, 16)),
}


@dataclass(frozen=True)
class Alignment:
    """The flow at images on their way from clean ones, A2.

    Lengths are root mean squares over pixels in [-1, 1].

    Attributes
    ----------
    kind : str
        How the images were corrupted.
    strengths : tuple of float
        The first one is the clean images, or the nearest to them.
    distance : Tensor, shape (S, N)
        |x - clean| by strength and image.
    values : dict of str to Tensor, shape (S, T, N)
        By strength, flow time and image: ``|v|`` of v(x, t); ``|x - D|``, D at
        ``t x + (1 - t) e`` with one draw of noise e; the cosine of each,
        v and D - x, with the direction to the clean image, clean - x. Not a number for D at
        t = 1, where D = x, nor for a cosine at clean images.
    """

    kind: str
    strengths: tuple[float, ...]
    distance: Tensor
    values: dict[str, Tensor]

    def rank_correlation(self, value: str) -> list[list[float]]:
        """Return Spearman's rho of a value with the distance, by flow time and image."""
        from scipy.stats import spearmanr  # half a second, which every command would wait

        columns = self.values[value].unbind(1)
        return [
            [
                float(spearmanr(distance, column).statistic)
                for distance, column in zip(self.distance.T, values.T, strict=True)
            ]
            for values in columns
        ]


@torch.no_grad()
def measure_alignment(
    network: nn.Module, kind: str, strengths: Sequence[float], images: Tensor, clean: Tensor
) -> Alignment:
    """Return the flow's length and direction at images on their way from clean ones.

    Parameters
    ----------
    network : nn.Module
        The velocity v(x, t).
    kind : str
    strengths : sequence of float
    images : Tensor, shape (S, N, 3, H, W)
        In [0, 1], by strength.
    clean : Tensor, shape (N, 3, H, W)
        In [0, 1].
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    # The same noise at every strength: differences are of the images alone.
    noise = torch.randn(clean.shape, generator=generator).to(device)
    shape = (len(images), len(TIMES), len(clean))
    values = {name: torch.full(shape, torch.nan) for name in VALUES}
    distance = torch.zeros(len(images), len(clean))
    x1 = 2 * clean.to(device) - 1
    for row, corrupted in enumerate(images):
        x = 2 * corrupted.to(device) - 1
        back = (x1 - x).flatten(1)
        distance[row] = _length(back)
        for column, t in enumerate(TIMES):
            velocity = network(x, x.new_full((len(x),), t)).flatten(1)
            values["|v|"][row, column] = _length(velocity)
            values["cos(v, clean - x)"][row, column] = _cosine(velocity, back)
            if t == 1:
                continue  # D = x
            step = (denoise(network, torch.lerp(noise, x, t), t) - x).flatten(1)
            values["|x - D|"][row, column] = _length(step)
            values["cos(D - x, clean - x)"][row, column] = _cosine(step, back)
    return Alignment(kind, tuple(strengths), distance, values)


def corrupt(images: Tensor, kind: str) -> tuple[tuple[float, ...], Tensor]:
    """Return the strengths of a corruption, 0 first, and the images, shape (S, N, 3, H, W)."""
    change, strengths = CORRUPTIONS[kind]
    generator = torch.Generator().manual_seed(0)
    corrupted = [change(images, strength, generator) for strength in strengths]
    return (0.0, *strengths), torch.stack([images, *corrupted])


@dataclass(frozen=True)
class Path:
    """The iterates of a real attack.

    Attributes
    ----------
    iterations : tuple of int
        Iterations done before each of the iterates.
    iterates : Tensor, shape (S, N, 3, H, W)
        In [0, 1], each image beside its private one.
    clean : Tensor, shape (N, 3, H, W)
        The private images, in [0, 1].
    """

    iterations: tuple[int, ...]
    iterates: Tensor
    clean: Tensor


def attack_path(
    images: ImageSet, info: DatasetInfo, weights: str, iterations: int, kept: int = 11
) -> Path:
    """Attack one client with flow_matching and return the iterates on the way.

    Parameters
    ----------
    images : ImageSet
        To draw the private images of a client with `CLIENT`'s training from, seed 0.
    info : DatasetInfo
    weights : str
        As `load_flow` takes it.
    iterations : int
        Of the attack, 2 or more.
    kept : int
        Most iterates to keep, evenly spaced, the first and the last among them.
    """
    observation, knowledge, truth = draw_client(Case(CLIENT, AttackConfig()), images, info, 0)
    seen: list[Tensor] = []

    # The attack hands out its last iterate alone; all of them pass through the optimiser.
    def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        moved = optimizer.param_groups[0]["params"][0]
        if moved.shape[1:] == knowledge.image_shape:  # not the weights of a simulated client
            seen.append(moved.detach().cpu().clone())

    hook = register_optimizer_step_pre_hook(keep)
    try:
        attack = AttackConfig("flow_matching", iterations, options={"matching": "trajectory"})
        found = run_attack(observation, knowledge, attack, PriorConfig(weights), 0)
    finally:
        hook.remove()
    spaced = torch.linspace(0, iterations, kept).round().long().unique()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (knowledge.mean, knowledge.std))
    iterates = [*((x * std + mean).clamp(0, 1) for x in seen), found.images]
    order = assign(found.images, truth.images)
    chosen = tuple(spaced.tolist())
    return Path(chosen, torch.stack([iterates[k][order] for k in chosen]), truth.images)


@torch.no_grad()
def path_ratios(network: nn.Module, iterates: Tensor) -> Tensor:
    """Return ``|v(x_k, t) - v(x_j, t)| / |x_k - x_j|`` of all pairs of iterates.

    Parameters
    ----------
    network : nn.Module
        The velocity v(x, t).
    iterates : Tensor, shape (S, N, 3, H, W)
        In [0, 1].

    Returns
    -------
    Tensor, shape (T, S (S - 1) / 2, N)
        By flow time, pair and image.
    """
    device = next(network.parameters()).device
    x = 2 * iterates.to(device) - 1
    first, second = torch.triu_indices(len(x), len(x), 1)
    apart = _length((x[first] - x[second]).flatten(2))
    ratios = []
    for t in TIMES:
        v = torch.stack([network(batch, batch.new_full((len(batch),), t)) for batch in x])
        ratios.append(_length((v[first] - v[second]).flatten(2)) / apart)
    return torch.stack(ratios).cpu()


def jacobian_norm(network: nn.Module, images: Tensor, t: float, iterations: int) -> Tensor:
    """Return the spectral norm of ``dv(x, t)/dx`` at each image, shape (N,).

    By power iterations on J^T J, from a random start: an estimate from below. Ten
    came within 6% of sixty on three images.

    Parameters
    ----------
    network : nn.Module
        The velocity v(x, t), each image's for itself.
    images : Tensor, shape (N, 3, H, W)
        In [0, 1].
    t : float
        Flow time.
    iterations : int
    """
    device = next(network.parameters()).device
    x = 2 * images.to(device) - 1
    times = x.new_full((len(x),), t)

    def velocity(x: Tensor) -> Tensor:
        return network(x, times)

    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, generator=generator).to(device)
    back = vjp(velocity, x)[1]
    for _ in range(iterations):
        direction = F.normalize(direction.flatten(1)).view_as(x)
        pushed = jvp(velocity, (x,), (direction,))[1]
        (direction,) = back(pushed)
    return pushed.flatten(1).norm(dim=1).detach().cpu()


def assumption_tables(
    weights: str, images: ImageSet, info: DatasetInfo, count: int, iterations: int
) -> list[str]:
    """Measure both assumptions and return the tables in Markdown, by lines.

    Parameters
    ----------
    weights : str
        As `load_flow` takes it.
    images : ImageSet
        Images that the network was not trained on.
    info : DatasetInfo
    count : int
        How many of them to corrupt, drawn with seed 0.
    iterations : int
        Of the attack whose iterates are looked at.

    Raises
    ------
    ValueError
        If there are no such weights, they don't take such images, or a number is
        out of its range.
    """
    if not 2 <= count <= len(images):
        raise ValueError(f"images is {count}; allowed: 2 to {len(images)}, those of the split")
    if iterations < 2:
        raise ValueError(f"iterations is {iterations}; allowed: 2 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Forward-mode derivatives of GroupNorm do not take the channels-last layout.
    network = load_flow(weights, device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    check_shape(network, images.images.shape)
    picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    clean = images.images[picks].float() / 255
    rows = [measure_alignment(network, k, *corrupt(clean, k), clean) for k in CORRUPTIONS]
    path = attack_path(images, info, weights, iterations)
    # The nearest first, as with the others: the attack goes the other way.
    strengths = tuple(float(k) for k in reversed(path.iterations))
    kind = "attack, iterations done"
    rows.append(measure_alignment(network, kind, strengths, path.iterates.flip(0), path.clean))
    return [
        "## A1: Lipschitz continuity",
        "",
        "|v(x_k, t) - v(x_j, t)| / |x_k - x_j| between iterates of an attack, and the norm of the "
        f"Jacobian of v at three of them and at the private images ({_POWER_ITERATIONS} power "
        f"iterations). Means over {len(path.clean)} images with 95% intervals, and the largest "
        "values. The exact flow towards one image has 1/(1 - t) everywhere.",
        "",
        *markdown_table(_lipschitz_cells(network, path)),
        "",
        "## A2: velocity and distance",
        "",
        f"Means over images ({count}; {len(path.clean)} for the attack) with 95% intervals; "
        "distances and lengths are root mean squares over pixels in [-1, 1].",
        *(line for value in VALUES for line in _alignment_section(rows, value)),
        "",
        "### Rank correlation with the distance",
        "",
        "Spearman's over the strengths of a corruption, image by image: 1 where the value grows "
        "with every step away from the clean image.",
        "",
        *markdown_table(_correlation_cells(rows)),
    ]


def _lipschitz_cells(network: nn.Module, path: Path) -> list[list[str]]:
    """Return the lines of A1's table, its head first."""
    ratios = path_ratios(network, path.iterates)
    places = (0, len(path.iterations) // 2, -1)
    points = {f"Jacobian, iteration {path.iterations[i]}": path.iterates[i] for i in places}
    points["Jacobian, private images"] = path.clean
    cells = [["t", "between iterates", "largest", *points, "largest", "1/(1 - t)"]]
    for t, pairs in zip(TIMES, ratios, strict=True):
        norms = [jacobian_norm(network, x, t, _POWER_ITERATIONS) for x in points.values()]
        cells.append(
            [
                f"{t:g}",
                _with_interval(pairs.mean(0), DISTANCE),
                f"{float(pairs.max()):.3f}",
                *(_with_interval(norm, DISTANCE) for norm in norms),
                f"{float(torch.stack(norms).max()):.3f}",
                f"{1 / (1 - t):.0f}" if t < 1 else "infinite",
            ]
        )
    return cells


def _alignment_section(rows: Sequence[Alignment], value: str) -> list[str]:
    """Return one value's table, below its heading."""
    cells = [["images", "strength", "distance", *(f"t={t:g}" for t in TIMES)]]
    for row in rows:
        for strength, distance, values in zip(
            row.strengths, row.distance, row.values[value], strict=True
        ):
            bounds = COSINE if value.startswith("cos") else DISTANCE
            columns = [_with_interval(distance, DISTANCE)]
            columns += [_with_interval(column, bounds) for column in values]
            cells.append([row.kind, f"{strength:g}", *columns])
    return ["", f"### {value}", "", *markdown_table(cells)]


def _correlation_cells(rows: Sequence[Alignment]) -> list[list[str]]:
    cells = [["images", "value", *(f"t={t:g}" for t in TIMES)]]
    for row in rows:
        for value, shown in (("|v|", "length of v"), ("|x - D|", "length of x - D")):
            correlations = row.rank_correlation(value)
            columns = [_with_interval(torch.tensor(c), COSINE) for c in correlations]
            cells.append([row.kind, shown, *columns])
    return cells


def _length(difference: Tensor) -> Tensor:
    """Return the root mean square over the last axis."""
    return difference.square().mean(-1).sqrt()


def _cosine(step: Tensor, back: Tensor) -> Tensor:
    """Return the cosine of each pair of rows, not a number where one is zero."""
    return (step * back).sum(-1) / (step.norm(dim=-1) * back.norm(dim=-1))


def _with_interval(values: Tensor, bounds: Bounds) -> str:
    if not values.isfinite().all():
        return ""
    return with_interval(values.tolist(), 3, bounds)

"""The paper's figures, drawn from our rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fl_app.audit.pictures import save_grid
from fl_app.benchmarks.assumptions import CORRUPTIONS, TIMES, corrupt, measure_alignment
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.data import ImageSet
from fl_app.util.files import whole_file
from server_strategies.priors.flow import load_flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TIME = 0.95  # of Figure 2's velocities


def _lines(
    panel: Axes, results: AttackResults, metric: str, place: Callable[[Case], float]
) -> None:
    """Draw a line an attack, with the values of all trials, and the mean colour's, dotted."""
    cases = [case for case in results.cases if results.of(case)]
    for attack in dict.fromkeys(case.attack_words for case in cases):
        points = []
        for case in cases:
            if case.attack_words == attack:
                values = [row["metrics"][metric]["mean"] for row in results.of(case)]
                points.append((place(case), sum(values) / len(values)))
                panel.plot([place(case)] * len(values), values, ".", color="grey", alpha=0.4)
        panel.plot(*zip(*sorted(points), strict=True), marker="o", label=attack)
    colour = {place(case): results.summary(case)[metric]["baseline"] for case in cases}
    panel.plot(*zip(*sorted(colour.items()), strict=True), "k:", label="mean colour")


def batch_sizes(path: Path, results: AttackResults) -> None:
    """Draw Figure 3: MSE over the batch size, a line an attack.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    results : AttackResults
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    _lines(panel, results, "mse", lambda case: case.training.batch_size)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("batch size B")
    panel.set_ylabel("MSE")
    panel.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def pictures(path: Path, results: AttackResults) -> None:
    """Write Figure 5: the first trial's private images, and what each attack made of them."""
    columns: dict[str, list[torch.Tensor | None]] = {}
    for case in results.cases:
        for row in results.of(case)[:1]:
            columns.setdefault("private", list(_images(row["private"])))
            psnr = f"{row['metrics']['psnr']['mean']:.1f} dB"
            columns["\n".join([*case.attack_words.split(), psnr])] = list(_images(row["found"]))
    first = next(case for case in results.cases if results.of(case))
    save_grid(path, columns, [f"{first.client}, labels {first.labels}"])


def _images(bytes_: Iterable[object]) -> torch.Tensor:
    return torch.tensor(bytes_, dtype=torch.float32) / 255


def velocities(path: Path, weights: str, images: ImageSet, count: int) -> list[list[str]]:
    """Draw Figure 2 as it can be measured: the velocity's length over the distance from an image.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    weights : str
        As `load_flow` takes it.
    images : ImageSet
        That the network was not trained on.
    count : int
        Of them, drawn with seed 0.

    Returns
    -------
    list of list of str
        The figures, by corruption and strength, their head first.
    """
    from matplotlib.figure import Figure

    network = load_flow(weights)
    picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    clean = images.images[picks].float() / 255
    figure = Figure(figsize=(7, 5), layout="constrained")
    panel = figure.subplots()
    cells = [["images", "strength", "distance", f"|v(x, {_TIME:g})|"]]
    for kind in CORRUPTIONS:
        found = measure_alignment(network, kind, *corrupt(clean, kind), clean)
        distances = found.distance.mean(1).tolist()
        lengths = found.values["|v|"][:, TIMES.index(_TIME)].mean(1).tolist()
        panel.plot(distances, lengths, marker="o", label=kind)
        for strength, distance, length in zip(found.strengths, distances, lengths, strict=True):
            cells.append([kind, f"{strength:g}", f"{distance:.3f}", f"{length:.3f}"])
    panel.set_xlabel("distance from the clean image, root mean square in [-1, 1]")
    panel.set_ylabel(f"length of the velocity at t = {_TIME:g}")
    panel.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return cells

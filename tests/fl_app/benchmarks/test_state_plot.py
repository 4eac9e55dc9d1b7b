"""The plot of leakage and accuracy over the states of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.state_plot import save_state_plot
from fl_app.config import AttackConfig
from fl_app.protocol import LocalTraining

STATES = {"init": None, "epoch-3": 0.4, "converged": 0.7}
CLIENTS = (LocalTraining("sgd", lr=0.01, local_steps=5), LocalTraining("adam", local_steps=5))
CASES = tuple(
    Case(client, AttackConfig(name, 2), state=state)
    for client in CLIENTS
    for state in STATES
    for name in ("sme", "dlf")
)


def row(case: Case, seed: int) -> dict[str, Any]:
    """A made-up row: leakage falls as the model learns."""
    psnr = 30 - 10 * list(STATES).index(case.state) + seed
    scores = {"psnr": (psnr, 13.0), "ssim": (psnr / 40, 0.1)}
    means = ("loss", "loss_at_truth", "seconds", "iterations_per_second", "peak_memory")
    return {
        "case": case.name,
        "seed": seed,
        "accuracy": STATES[case.state],
        "metrics": {
            name: {"values": [value], "mean": value, "baseline": baseline}
            for name, (value, baseline) in scores.items()
        },
        "psnr_by_step": [psnr],
        **dict.fromkeys((*means, "gflop_per_iteration"), 1.0),
    }


@pytest.mark.parametrize("trials", [2, 5])  # without intervals and with them
def test_the_curves_over_training_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    figures: list[Figure] = []
    subplots = Figure.subplots

    def remember(figure: Figure, *arguments: Any, **named: Any) -> Any:
        figures.append(figure)
        return subplots(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "subplots", remember)
    results = AttackResults("states", CASES)
    # The last state of Adam was not run yet.
    run = [case for case in CASES if (case.training, case.state) != (CLIENTS[1], "converged")]
    results.rows = [row(case, seed) for case in run for seed in range(trials)]
    path = tmp_path / "states.png"
    save_state_plot(path, results)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    axes: list[Axes] = figures[0].axes
    titles = [panel.get_title() for panel in axes if panel.get_title()]
    assert titles == ["sgd 0.01 K=5 B=1, labels counts", "adam 0.001 K=5 B=1, labels counts"]
    states = [[tick.get_text() for tick in panel.get_xticklabels()] for panel in axes[:2]]
    assert states == [["init", "epoch-3", "converged"], ["init", "epoch-3"]]
    (means,) = (line for line in axes[0].lines[:1])
    psnr = [30 + (trials - 1) / 2, 20 + (trials - 1) / 2, 10 + (trials - 1) / 2]
    assert list(means.get_ydata()) == pytest.approx(psnr)
    accuracy = next(panel for panel in axes if "accuracy" in panel.get_ylabel()).lines[0]
    assert list(accuracy.get_ydata()) == pytest.approx([40, 70])

"""The plot of `flowleak bench defenses`: privacy against accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_app.benchmarks.accuracy import Accuracies
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.defense_table import LOWER, METRICS
from fl_app.protocol import Defense
from fl_app.util.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Point = tuple[Case, float, dict[str, Any]]


def kind(defense: Defense) -> str:
    """Return which defence it is without its numbers: those of one kind are one curve."""
    if defense.local_dp:
        return "local_dp"
    modifiers = ("clip_by", "sigma", "dp_noise", "delta")
    words = []
    for setting in fields(defense):
        value = getattr(defense, setting.name)
        if value != setting.default and setting.name not in modifiers:
            words.append({"noise": value, "dp_clip": "dp"}.get(setting.name, setting.name))
    return " ".join(words)


def parameter(defense: Defense) -> str:
    """Return the number, or the format, by which a defence differs from others of its kind."""
    words = str(defense).removesuffix(" relative=true").split()
    return words[-1].rpartition("=")[2]


def save_defense_plot(path: Path, results: AttackResults, accuracies: Accuracies) -> None:
    """Draw privacy against accuracy: one curve a kind of defence, over its parameter.

    Of flow_matching's cases: a panel a metric, solid where the attacker knows the
    defence and dashed where it does not, a star for no defence, a dotted line for
    the mean colour; each point with its parameter. Only of the client with the most
    cases.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    results : AttackResults
    accuracies : Accuracies
    """
    # Slow to import, and only a plot needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6), layout="constrained")
    panels = figure.subplots(1, len(METRICS))
    points = _points(results, accuracies)
    for panel, metric in zip(panels, METRICS, strict=True):
        scored = [point for point in points if point[2].get(metric)]
        _draw_curves(panel, metric, scored)
        panel.set_xlabel("accuracy of the global model, %")
        panel.set_ylabel(METRICS[metric][0] + (" (low: leaks)" if metric in LOWER else ""))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9)
    figure.suptitle("flow_matching; solid: the attacker knows the defence, dashed: it does not")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_curves(panel: Axes, metric: str, points: Sequence[_Point]) -> None:
    kinds = list(dict.fromkeys(kind(case.defense) for case, *_ in points))
    for name, known in product(kinds, (True, False)):
        curve = [
            (100 * accuracy, summary[metric]["mean"], parameter(case.defense))
            for case, accuracy, summary in points
            if (kind(case.defense), case.defense_known) == (name, known)
        ]
        if not curve:
            continue
        x, y, parameters = zip(*curve, strict=True)
        panel.plot(
            x,
            y,
            marker="o" if name else "*",
            markersize=5 if name else 15,
            linestyle="-" if known else "--",
            color=f"C{kinds.index(name) % 10}",
            label=(name or "no defence") if known else None,
        )
        for place in zip(x, y, parameters, strict=True) if known and name else ():
            panel.annotate(place[2], place[:2], (3, 3), textcoords="offset points", fontsize=7)
    if points:
        baseline = sum(summary[metric]["baseline"] for *_, summary in points) / len(points)
        panel.axhline(baseline, linestyle=":", color="grey", label="mean colour")


def _points(results: AttackResults, accuracies: Accuracies) -> list[_Point]:
    """Return the cases of the plot, with their accuracy and their summary, by their parameter."""
    points: list[_Point] = []
    for case in results.cases:
        reached, summary = accuracies.of(case), results.summary(case)
        if case.attack.name != "flow_matching" or not reached or not summary["trials"]:
            continue
        points.append((case, sum(reached.values()) / len(reached), summary))
    most = [case.training for case, *_ in points]
    shown = max(dict.fromkeys(most), key=most.count, default=None)
    points.sort(key=lambda point: astuple(point[0].defense))
    return [point for point in points if point[0].training == shown]

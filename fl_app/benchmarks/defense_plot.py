"""The plot of `flowleak bench defenses`: privacy against accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from fl_app.util.intervals import PERCENT, Spread, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = 11  # points of a label's letters
_ROW, _LETTER = 18.0, 9.0  # pixels of a label's line, and of one of its letters
_Point = tuple[Case, Spread, dict[str, Any]]
_Label = tuple[float, float, str, str]  # where it points to, in the data; its words and colour


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
    the mean colour; each point with its parameter and its 95% intervals. Only of the client
    with the most cases.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    results : AttackResults
    accuracies : Accuracies
    """
    # Slow to import, and only a plot needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 18), layout="constrained")
    panels = figure.subplots(len(METRICS), 1)
    points = _points(results, accuracies)
    labels = []
    for panel, metric in zip(panels, METRICS, strict=True):
        scored = [point for point in points if point[2].get(metric)]
        labels.append(_draw_curves(panel, metric, scored))
        panel.set_xlabel("accuracy of the global model, %", fontsize=_SIZE)
        words = METRICS[metric][0] + (" (low: leaks)" if metric in LOWER else "")
        panel.set_ylabel(words, fontsize=_SIZE)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=13)
    title = "flow_matching with 95% intervals; solid: the attacker knows the defence, dashed: not"
    figure.suptitle(title, fontsize=15)
    figure.draw_without_rendering()  # which decides where the points are
    for panel, found in zip(panels, labels, strict=True):
        _write_labels(panel, found)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_curves(panel: Axes, metric: str, points: Sequence[_Point]) -> list[_Label]:
    """Draw the curves of a panel; return what is to stand beside their points."""
    kinds = list(dict.fromkeys(kind(case.defense) for case, *_ in points))
    labels: list[_Label] = []
    for name, known in product(kinds, (True, False)):
        curve = [
            point
            for point in points
            if (kind(point[0].defense), point[0].defense_known) == (name, known)
        ]
        if not curve:
            continue
        accuracies = [accuracy for _, accuracy, _ in curve]
        scores: list[Mapping[str, Any]] = [summary[metric] for *_, summary in curve]
        color = f"C{kinds.index(name) % 10}"
        x, y = [each["mean"] for each in accuracies], [each["mean"] for each in scores]
        panel.plot(
            x,
            y,
            marker="o" if name else "*",
            markersize=5 if name else 15,
            linestyle="-" if known else "--",
            color=color,
            label=(name or "no defence") if known else None,
        )
        panel.errorbar(x, y, _ends(scores), _ends(accuracies), fmt="none", ecolor=color, alpha=0.4)
        if known and name:
            words = [parameter(case.defense) for case, *_ in curve]
            labels += [(*each, color) for each in zip(x, y, words, strict=True)]
    if points:
        baseline = sum(summary[metric]["baseline"] for *_, summary in points) / len(points)
        panel.axhline(baseline, linestyle=":", color="grey", label="mean colour")
    return labels


def _ends(scores: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """Return how far the intervals reach below and above their means; 0 where there is none."""
    pairs = [(each["mean"], each["low"], each["high"]) for each in scores]
    return [
        [0.0 if low is None else mean - low for mean, low, _ in pairs],
        [0.0 if high is None else high - mean for mean, _, high in pairs],
    ]


def _write_labels(panel: Axes, labels: Iterable[_Label]) -> None:
    """Write words right of their points, one below the other where they would overlap."""
    taken: list[tuple[float, float, float]] = []
    for x, y, words, color in sorted(labels, key=lambda each: -each[1]):
        left, height = panel.transData.transform((x, y))
        width, lowest = _LETTER * (len(words) + 2), height
        while near := [
            at for start, at, end in taken
            if start < left + width and left < end and abs(at - height) < _ROW
        ]:  # fmt: skip
            height = min(near) - _ROW
        taken.append((left, height, left + width))
        moved = lowest - height
        panel.annotate(
            words,
            (x, y),
            (9, 8 - moved * 72 / panel.figure.dpi),
            textcoords="offset points",
            fontsize=_SIZE,
            color=color,
            va="center",
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5} if moved else None,
        )


def _points(results: AttackResults, accuracies: Accuracies) -> list[_Point]:
    """Return the cases of the plot, with their accuracy and their summary, by their parameter."""
    points: list[_Point] = []
    for case in results.cases:
        reached, summary = accuracies.of(case), results.summary(case)
        if case.attack.name != "flow_matching" or not reached or not summary["trials"]:
            continue
        shares = [100 * share for share in reached.values()]
        points.append((case, spread(shares, PERCENT), summary))
    most = [case.training for case, *_ in points]
    shown = max(dict.fromkeys(most), key=most.count, default=None)
    points.sort(key=lambda point: astuple(point[0].defense))
    return [point for point in points if point[0].training == shown]

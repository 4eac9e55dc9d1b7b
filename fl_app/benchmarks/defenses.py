"""What defences cost and what they buy: the tables and the plot of `flowleak bench defenses`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from client_app.training import NO_DEFENSE
from fl_app.audit.metrics import with_interval
from fl_app.benchmarks.accuracy import Federation, federated_accuracy
from fl_app.benchmarks.benchmark import Benchmark
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.processes import in_processes
from fl_app.benchmarks.rows import commits, kept_rows, with_commit
from fl_app.data import ImageSet
from fl_app.protocol import DatasetInfo, Defense
from fl_app.util.files import whole_file, write_text
from fl_app.util.markdown import half_width, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METRICS = {"psnr": ("PSNR dB", 1), "ssim": ("SSIM", 3), "lpips_vgg": ("LPIPS VGG", 3)}
_LOWER = ("lpips_vgg",)  # better for an attacker
_COLUMNS = [
    "client", "defence", "attack", "attacker knows", "draws", "PSNR dB", "grey dB", "SSIM",
    "LPIPS VGG", "accuracy", "cost in points (seeds)", "update changed by", "bytes",
]  # fmt: skip

Accuracies = Mapping[str, Mapping[int, float]]
"""By `Federation.name`: the accuracy in [0, 1] by seed."""
Point = tuple[Case, float, dict[str, Any]]


def federation_of(case: Case) -> Federation | None:
    """Return the federation whose accuracy says what a case's defence costs.

    Its clients train as the case's, but for whole epochs in batches of 32, or nothing
    would be learnt in a few rounds. None for Soteria, which takes hundreds of
    backward passes a step.
    """
    if case.defense.soteria:
        return None
    training = replace(case.training, batch_size=32, local_steps=0, local_epochs=1, reshuffle=True)
    return Federation(training, case.defense, model=case.model)


def measure_accuracies(
    cases: Iterable[Case],
    data: tuple[ImageSet, ImageSet, DatasetInfo],
    facts: Mapping[str, Any],
    seed: int,
    console: Console,
    workers: int = 1,
    path: Path | None = None,
    train: bool = True,
) -> Accuracies:
    """Train each defence's federation and its undefended counterpart on the same seeds.

    As many of each as its case says (`Case.federations`).

    Parameters
    ----------
    cases : iterable of Case
    data : tuple
        Train and test images, and the data's facts.
    facts : mapping
        What the results depend on; a file with others is not resumed.
    seed : int
        Of the first federation.
    console : Console
        Shows the progress.
    workers : int
        See `in_processes`.
    path : Path, optional
        JSON file of all rows, written after each; an existing one is gone on with.
    train : bool
        False: what `path` holds is all.

    Returns
    -------
    mapping of str to mapping of int to float
        See `Accuracies`.

    Raises
    ------
    ValueError
        If `path` holds results of other facts.
    """
    rows: list[dict[str, Any]] = []
    if path and path.exists():
        rows = kept_rows(path, facts)
    wanted: dict[tuple[str, int], Federation] = {}
    for case in cases:
        federation = federation_of(case)
        if not federation:
            continue
        for number in range(seed, seed + case.federations):
            for each in (replace(federation, defense=NO_DEFENSE), federation):
                wanted[each.name, number] = each
    done = {(row["federation"], row["seed"]) for row in rows}
    todo = [
        (federation, number)
        for (name, number), federation in sorted(wanted.items(), key=lambda item: item[0][1])
        if train and (name, number) not in done
    ]
    if todo:
        for row in in_processes(_measure, data, todo, workers, "accuracy", console):
            rows.append(with_commit(row, facts))
            if path:
                content = {"facts": {**facts, "commit": commits(rows)}, "rows": rows}
                write_text(path, json.dumps(content, indent=1) + "\n")
    reached: dict[str, dict[int, float]] = {}
    for row in rows:
        reached.setdefault(row["federation"], {})[row["seed"]] = row["accuracy"]
    return reached


def _measure(
    data: tuple[ImageSet, ImageSet, DatasetInfo], federation: Federation, seed: int
) -> dict[str, Any]:
    accuracy = federated_accuracy(federation, *data, seed)
    return {"federation": federation.name, "seed": seed, "accuracy": accuracy}


def defense_cells(benchmark: Benchmark, accuracies: Accuracies) -> list[list[str]]:
    """Return the lines of the table, its head first: a line a case that was run.

    Leakage with its 95% interval over draws; the accuracy of the federation, and
    the points that it lost to the undefended one of the same seeds, and their number.
    """
    lines = [list(_COLUMNS)]
    for case in benchmark.cases:
        summary = benchmark.summary(case)
        if not summary["draws"]:
            continue
        rows = [row for row in benchmark.rows if row["case"] == case.name]
        undefended = replace(case, defense=NO_DEFENSE)
        accuracy, lost = _cost(case, accuracies)
        knows = "-" if case.defense == NO_DEFENSE else "yes" if case.defense_known else "no"
        changed = sum(row["distortion"] for row in rows) / len(rows)
        size = sum(row["update_bytes"] for row in rows) / len(rows)
        lines.append(
            [
                undefended.client,
                str(case.defense),
                f"{case.attack.name} x{case.attack.iterations}",
                knows,
                str(summary["draws"]),
                _scored(summary, "psnr"),
                f"{summary['psnr']['baseline']:.1f}",
                _scored(summary, "ssim"),
                _scored(summary, "lpips_vgg"),
                accuracy,
                lost,
                f"{changed:.1%}",
                f"{size:,.0f} ({rows[0]['update_encoding']})",
            ]
        )
    return lines


def _scored(summary: Mapping[str, Any], metric: str) -> str:
    score, digits = summary.get(metric), _METRICS[metric][1]
    return f"{score['mean']:.{digits}f}{half_width(score, digits)}" if score else "-"


def _cost(case: Case, accuracies: Accuracies) -> tuple[str, str]:
    """Return a case's accuracy and what its defence cost, in words."""
    federation = federation_of(case)
    ours = accuracies.get(federation.name, {}) if federation else {}
    if not federation or not ours:
        return "-", "-"
    accuracy = f"{100 * sum(ours.values()) / len(ours):.1f}%"
    theirs = accuracies.get(replace(federation, defense=NO_DEFENSE).name, {})
    lost = [100 * (theirs[number] - ours[number]) for number in ours if number in theirs]
    if case.defense == NO_DEFENSE or not lost:
        return accuracy, "-"
    return accuracy, f"{with_interval(lost, 1)} ({len(lost)})"


def compare_with_sme(benchmark: Benchmark) -> list[str]:
    """Say, for each client and defence, on which metrics flow_matching is above SME.

    Above: its 95% interval over draws is on the better side of SME's and does
    not overlap it. Beside it by how much, draw by draw: what makes a draw hard is
    the same for both.
    """
    by_side: dict[str, dict[str, Case]] = {}
    for case in benchmark.cases:
        by_side.setdefault(case.client, {}).setdefault(case.attack.name, case)
    lines = []
    for client, attacks in by_side.items():
        if not {"flow_matching", "sme"} <= attacks.keys():
            continue
        ours, theirs = (benchmark.summary(attacks[name]) for name in ("flow_matching", "sme"))
        if not ours["draws"] or not theirs["draws"]:
            continue
        above = [_METRICS[m][0] for m in _METRICS if _is_above(ours.get(m), theirs.get(m), m)]
        words = ", ".join(above) or "no metric"
        line = f"- {client}: flow_matching is above sme, intervals apart, on {words}"
        gains = {
            name: signed(benchmark.gain(attacks["flow_matching"], attacks["sme"], m), digits)
            for m, (name, digits) in _METRICS.items()
        }
        pairs = ", ".join(f"{name} {gain}" for name, gain in gains.items() if gain)
        lines.append(f"{line}; draw by draw {pairs}." if pairs else f"{line}.")
    return lines


def _is_above(
    ours: Mapping[str, float] | None, theirs: Mapping[str, float] | None, metric: str
) -> bool:
    if not ours or not theirs or None in (*ours.values(), *theirs.values()):
        return False
    if metric in _LOWER:
        return ours["high"] < theirs["low"]
    return ours["low"] > theirs["high"]


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


def save_defense_plot(path: Path, benchmark: Benchmark, accuracies: Accuracies) -> None:
    """Draw privacy against accuracy: one curve a kind of defence, over its parameter.

    Of flow_matching's cases: a panel a metric, solid where the attacker knows the
    defence and dashed where it does not, a star for no defence, a dotted line for
    the grey image; each point with its parameter. Only of the client with the most
    cases.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    benchmark : Benchmark
    accuracies : mapping
        See `measure_accuracies`.
    """
    # Slow to import, and only a plot needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6), layout="constrained")
    panels = figure.subplots(1, len(_METRICS))
    points = _points(benchmark, accuracies)
    for panel, metric in zip(panels, _METRICS, strict=True):
        scored = [point for point in points if point[2].get(metric)]
        _draw_curves(panel, metric, scored)
        panel.set_xlabel("accuracy of the global model, %")
        panel.set_ylabel(_METRICS[metric][0] + (" (low: leaks)" if metric in _LOWER else ""))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9)
    figure.suptitle("flow_matching; solid: the attacker knows the defence, dashed: it does not")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_curves(panel: Axes, metric: str, points: Sequence[Point]) -> None:
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
        grey = sum(summary[metric]["baseline"] for *_, summary in points) / len(points)
        panel.axhline(grey, linestyle=":", color="grey", label="grey image")


def _points(benchmark: Benchmark, accuracies: Accuracies) -> list[Point]:
    """Return the cases of the plot, with their accuracy and their summary, by their parameter."""
    points: list[Point] = []
    for case in benchmark.cases:
        federation = federation_of(case)
        reached = accuracies.get(federation.name) if federation else None
        summary = benchmark.summary(case)
        if case.attack.name != "flow_matching" or not reached or not summary["draws"]:
            continue
        points.append((case, sum(reached.values()) / len(reached), summary))
    most = [case.training for case, *_ in points]
    shown = max(dict.fromkeys(most), key=most.count, default=None)
    points.sort(key=lambda point: astuple(point[0].defense))
    return [point for point in points if point[0].training == shown]

"""A run by round: how good the global model is, and how much its updates leak (Figure 4)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from fl_app.audit.exposure import (
    Identified,
    bounds_of,
    count_words,
    identified_of,
    mean_single_colour,
    summary_over,
    verdict,
)
from fl_app.audit.leakage_log import read_lines
from fl_app.util.files import whole_file
from fl_app.util.intervals import PERCENT, Bounds, spread, spread_words
from fl_app.util.reading import BrokenFileError, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips_vgg": "LPIPS VGG", "lpips_alex": "LPIPS Alex"}
_DIGITS = {"psnr": 1}  # after the point; 3 otherwise


@dataclass(frozen=True)
class RoundScore:
    """One metric of one attack in one round: over the updates that it was scored on.

    Attributes
    ----------
    mean : float
        Of the updates' means.
    low, high : float or None
        The 95% interval of the mean; None for few updates, see `spread`.
    values : sequence of float
        The updates' means.
    median, worst_tenth : float or None
        Of the images of all updates, see `summary_over`.
    mean_colour : float
        The mean of the mean-colour baseline's scores on the same images.
    """

    mean: float
    low: float | None
    high: float | None
    values: Sequence[float]
    median: float | None
    worst_tenth: float | None
    mean_colour: float


@dataclass(frozen=True)
class RoundLine:
    """What one round shows, of one attack.

    Attributes
    ----------
    round : int
    accuracy : float or None
        Of the global model after the round, in [0, 1], on the clients' test
        images; None where no client evaluated it.
    attack : str or None
        None: no update of the round has a line in the log.
    succeeded, updates : int
        Updates that the attack succeeded on, and that it was run on.
    scores : mapping of str to RoundScore
        By the names in `METRICS`; without those that no update has.
    single_colour : float or None
        Mean PSNR in dB of the best single colour of each image.
    identified : Identified or None
        Of the images of all updates.
    labels : str
        What attacks were given of the labels, see `Knowledge`.
    """

    round: int
    accuracy: float | None
    attack: str | None
    succeeded: int
    updates: int
    scores: Mapping[str, RoundScore]
    single_colour: float | None = None
    identified: Identified | None = None
    labels: str = ""


class _Round(TypedDict):
    round: int
    evaluate: Mapping[str, float]


def read_accuracy(run_dir: Path) -> dict[int, float | None]:
    """Return the global model's accuracy after each round; None where no client evaluated it.

    Empty where the training has not ended.

    Raises
    ------
    BrokenFileError
        If ``training.json`` can't be used.
    """
    path = run_dir / "training.json"  # written at the training's end
    if not os.path.lexists(path):
        return {}
    rounds: list[_Round] = read_json(path, Sequence[_Round])
    return {entry["round"]: entry["evaluate"].get("accuracy") for entry in rounds}


def read_rounds(run_dir: Path) -> tuple[list[RoundLine], list[str]]:
    """Return a run by round and attack, from ``training.json`` and ``leakage.jsonl``.

    The updates of round r start from the model after round r - 1. An attack's
    last line on an update counts.

    Returns
    -------
    lines : list of RoundLine
    problems : list of str
        What could not be read, and why.
    """
    accuracy: dict[int, float | None] = {}
    problems: list[str] = []
    try:
        accuracy = read_accuracy(run_dir)
    except BrokenFileError as error:
        problems.append(str(error))
    logged, bad = read_lines(run_dir / "leakage.jsonl")
    return by_round(logged, accuracy), [*problems, *map(str, bad)]


def by_round(
    logged: Iterable[dict[str, Any]], accuracy: Mapping[int, float | None]
) -> list[RoundLine]:
    """Return a run by round and attack; an attack's last line on an update counts.

    Parameters
    ----------
    logged : iterable of dict
        Lines of the log, in its order.
    accuracy : mapping of int to (float or None)
        See `read_accuracy`.
    """
    latest: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for line in logged:
        latest.setdefault((line["round"], line["attack"]), {})[line["node"]] = line
    attacked = {round_ for round_, _ in latest}
    silent = [
        RoundLine(round_, accuracy[round_], None, 0, 0, {})
        for round_ in accuracy
        if round_ not in attacked
    ]
    found = [
        _line(round_, accuracy.get(round_), attack, list(lines.values()))
        for (round_, attack), lines in latest.items()
    ]
    return sorted(silent + found, key=lambda line: line.round)


def _line(
    round_: int, accuracy: float | None, attack: str, lines: Sequence[Mapping[str, Any]]
) -> RoundLine:
    good = [line for line in lines if line["status"] == "ok"]
    scores = {}
    for name in METRICS:
        known = [line["metrics"][name] for line in good if line["metrics"].get(name)]
        known = [score for score in known if None not in (score["mean"], score["baseline"])]
        if known:
            scores[name] = _score(name, known)
    return RoundLine(
        round_,
        accuracy,
        attack,
        len(good),
        len(lines),
        scores,
        mean_single_colour(good),
        identified_of(good),
        ", ".join(dict.fromkeys(line["labels"] for line in lines)),
    )


def _score(name: str, known: Sequence[Mapping[str, Any]]) -> RoundScore:
    return RoundScore(
        **spread([score["mean"] for score in known], bounds_of(name)),
        **summary_over(name, known),
        mean_colour=sum(score["baseline"] for score in known) / len(known),
    )


def rounds_cells(lines: Sequence[RoundLine]) -> list[list[str]]:
    """Return the table's rows, its head first; a metric that no line has is left out.

    The note says where the PSNR shows no reconstruction, see `verdict`.
    """
    there = [name for name in METRICS if any(name in line.scores for line in lines)]
    head = ["round", "accuracy %", "attack", "labels", "updates", "identified"]
    for name in there:
        head += [METRICS[name], "median", "worst tenth", "mean colour"]
        head += ["single colour"] * (name == "psnr")
    rows = [[*head, "note"]]
    for line in lines:
        accuracy = "-" if line.accuracy is None else f"{100 * line.accuracy:.1f}"
        updates = f"{line.succeeded}/{line.updates}" if line.attack else "-"
        identified = count_words(line.identified)
        attack, labels = line.attack or "-", line.labels or "-"
        cells = [str(line.round), accuracy, attack, labels, updates, identified]
        for name in there:
            cells += _score_cells(line.scores.get(name), _DIGITS.get(name, 3))
            if name == "psnr":
                cells.append(_decimal(line.single_colour, _DIGITS[name]))
        psnr = line.scores.get("psnr")
        note = verdict(psnr.mean, psnr.mean_colour, line.single_colour) if psnr else ""
        rows.append([*cells, note])
    return rows


def _score_cells(score: RoundScore | None, digits: int) -> list[str]:
    if score is None:
        return ["-"] * 4
    others = (score.median, score.worst_tenth, score.mean_colour)
    return [spread_words(asdict(score), digits), *(_decimal(value, digits) for value in others)]


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def save_plot(
    path: Path, lines: Sequence[RoundLine], title: str, chance: float | None = None
) -> None:
    """Draw accuracy and each metric by round, attacks beside the baselines.

    Parameters
    ----------
    path : Path
        A PNG, written whole or not at all.
    lines : sequence of RoundLine
        One or more.
    title : str
    chance : float, optional
        The accuracy of a guess, in [0, 1].
    """
    # Slow to import, and only a plot needs it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    there = [name for name in METRICS if any(name in line.scores for line in lines)]
    figure = Figure(figsize=(7, 2 + 2 * len(there)), layout="constrained")
    panels = figure.subplots(1 + len(there), 1, sharex=True, squeeze=False)[:, 0]
    known = {line.round: 100 * line.accuracy for line in lines if line.accuracy is not None}
    panels[0].plot(list(known), list(known.values()), ".-", color="black")
    if chance is not None:
        panels[0].axhline(100 * chance, linestyle="--", color="grey", label="chance")
        panels[0].legend(fontsize="small")
    panels[0].set_ylabel("accuracy %")
    panels[0].set_title(title)
    _keep_within(panels[0], PERCENT)
    for panel, name in zip(panels[1:], there, strict=True):
        for attack in dict.fromkeys(line.attack for line in lines if name in line.scores):
            scored = [line for line in lines if line.attack == attack and name in line.scores]
            x, scores = [line.round for line in scored], [line.scores[name] for line in scored]
            (drawn,) = panel.plot(x, [score.mean for score in scores], ".-", label=attack)
            ends = [
                [score.mean if end is None else end for end in (score.low, score.high)]
                for score in scores
            ]
            panel.fill_between(x, *zip(*ends, strict=True), alpha=0.2, color=drawn.get_color())
        mean_colour = [(line.round, line.scores[name].mean_colour) for line in lines
                       if name in line.scores]  # fmt: skip
        _draw_baseline(panel, "mean colour", mean_colour, "--")
        if name == "psnr":
            single = [(line.round, line.single_colour) for line in lines
                      if line.single_colour is not None]  # fmt: skip
            _draw_baseline(panel, "best single colour", single, ":")
        panel.set_ylabel(METRICS[name])
        _keep_within(panel, bounds_of(name))
    if there:
        panels[1].legend(fontsize="small")
    panels[-1].set_xlabel("round")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_baseline(panel: Axes, name: str, values: Sequence[tuple[int, float]], style: str) -> None:
    """Draw what needs no update by round, the mean over the attacks of the round."""
    by_round: dict[int, list[float]] = {}
    for round_, value in values:
        by_round.setdefault(round_, []).append(value)
    rounds = sorted(by_round)
    means = [sum(by_round[round_]) / len(by_round[round_]) for round_ in rounds]
    marker = "." if len(rounds) == 1 else ""  # a line of one point is none
    panel.plot(rounds, means, linestyle=style, marker=marker, color="grey", label=name)


def _keep_within(panel: Axes, bounds: Bounds) -> None:
    """Show no value that there can't be: the drawing's margins end where the values do."""
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, bounds[0]), min(high, bounds[1]))

"""The tables of the report: comparison, failures, settings. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fl_app.audit.exposure import bounds_of, count_words, identified_of, mean_single_colour
from fl_app.audit.rounds import METRICS
from fl_app.config import ConfigError, load_config
from fl_app.report.model import Cells
from fl_app.report.source import Source, number
from fl_app.report.updates import setting_words
from fl_app.runs.advice import Advice, best, privacy_words
from fl_app.util.intervals import FEWEST, spread, spread_words
from fl_app.util.schema import problem

_COMPARED = {name: METRICS[name] for name in ("psnr", "ssim", "lpips_alex", "lpips_vgg")}
_DIGITS = {"psnr": 1}  # after the point; 3 otherwise
_NOTES = (
    "Each value is the mean over an update's images, then over updates: with its 95% interval from "
    f"{FEWEST} updates on, with the updates' values below.",
    "Mean colour: every image is the data set's mean colour. Best single colour: each is its own "
    "mean colour. What is not above both shows no reconstruction.",
)


def comparison(source: Source) -> tuple[Cells, tuple[str, ...]]:
    """Return the attacks beside what needs no update, and what is to be known of the table."""
    good = [line for line in source.lines if line["status"] == "ok"]
    if not any(line["metrics"] for line in good):
        return [], ()
    there = [name for name in _COMPARED if any(line["metrics"].get(name) for line in good)]
    head = ["attack", "updates", "identified", *(_COMPARED[name] for name in there), "seconds"]
    rows = []
    by_attack = {attack: source.of(attack) for attack in source.attacks}
    for attack in sorted(by_attack, key=lambda name: -_mean_psnr(by_attack[name])):
        lines = by_attack[attack]
        done = [line for line in lines if line["status"] == "ok"]
        found = [_over(name, done, "mean") for name in there]
        seconds = sum(line["seconds"] for line in done) / len(done) if done else None
        counts = [f"{len(done)} of {len(lines)}", count_words(identified_of(done))]
        rows.append([attack, *counts, *found, number(seconds, 1)])
    chance = [_over(name, good, "baseline") for name in there]
    rows.append(["mean colour", "", "", *chance, ""])
    single = number(mean_single_colour(good), 1)
    rows.append(["best single colour", "", "",
                 *(single if name == "psnr" else "-" for name in there), ""])  # fmt: skip
    rows += _other_baselines(source.compared, there)
    return [head, *rows], _NOTES


def advice_cells(rows: Sequence[Advice]) -> Cells:
    """Return what `flowleak advise` tried; each change with its number in `advice_chart`."""
    places = {row.change: f"best {place}" for place, row in enumerate(best(rows), 1)}
    head = ["no.", "change", "leaked", "PSNR dB", "accuracy", "s", "note"]
    return [
        head,
        *(
            [
                str(place),
                row.change,
                f"{row.leaked} of {row.of} {row.by}" if row.of else "",
                number(row.psnr, 1),
                "-" if row.accuracy is None else f"{row.accuracy:.1%}",
                f"{row.seconds:.0f}",
                row.problem
                or "; ".join(filter(None, (places.get(row.change), privacy_words(row), row.note))),
            ]
            for place, row in enumerate(rows, 1)
        ),
    ]


def _mean_psnr(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return an attack's mean PSNR over its updates, below all others where it has none."""
    known = [score["mean"] for line in lines if (score := line["metrics"].get("psnr"))]
    means = [mean for mean in known if mean is not None]
    return sum(means) / len(means) if means else -math.inf


def _over(metric: str, lines: Sequence[Mapping[str, Any]], what: str) -> str:
    """Return a metric over updates in words; of baselines the mean alone."""
    known = [score[what] for line in lines if (score := line["metrics"].get(metric))]
    values = [value for value in known if value is not None]
    if not values:
        return "-"
    found, digits = spread(values, bounds_of(metric)), _DIGITS.get(metric, 3)
    return number(found["mean"], digits) if what == "baseline" else spread_words(found, digits)


def _other_baselines(compared: Mapping[str, Any], there: Sequence[str]) -> Iterator[list[str]]:
    """Yield the baselines that a comparison scored: random images, the prior alone."""
    found = compared.get("baselines")
    if problem(found, Mapping[str, Mapping[str, Mapping[str, Any]]]):
        return
    assert isinstance(found, Mapping)
    for name, scores in found.items():
        if name == "mean colour":
            continue
        means = [scores.get(metric, {}).get("mean") for metric in there]
        words = [
            number(mean if isinstance(mean, float) else None, _DIGITS.get(metric, 3))
            for metric, mean in zip(there, means, strict=True)
        ]
        yield [name, "", "", *words, ""]


def failures(source: Source) -> Cells:
    """Return the attacks that failed and the updates that were skipped, with reasons."""
    bad = [line for line in source.lines if line["status"] != "ok"]
    if not bad:
        return []
    rows = [
        [str(line["round"]), source.client(line), line["attack"], line["status"],
         line["error"] or "no reason is logged"]
        for line in bad
    ]  # fmt: skip
    return [["round", "client", "attack", "outcome", "why"], *rows]


# Settings that say nothing of a user's own federation: its file of the clients does.
_OF_SIMULATIONS = {
    "rounds", "start_from", "checkpoints", "num_clients", "watch", "strategy", "dataset", "client",
}  # fmt: skip


def config_cells(source: Source) -> tuple[Cells, Cells]:
    """Return the settings that are not the defaults, and all settings."""
    if not source.config:
        return [], []
    ours = dict(_flat(asdict(source.config)))
    if source.described:
        ours = {k: v for k, v in ours.items() if k.partition(".")[0] not in _OF_SIMULATIONS}
    try:
        defaults = dict(_flat(asdict(load_config({}))))
    except ConfigError:  # the defaults are of this version, and were moved away
        defaults = {}
    rows = [[key, setting_words(ours[key]), _said(defaults, key)] for key in ours]
    changed = [row for row in rows if row[1] != row[2]]
    head = ["setting", "value", "default"]
    return [head, *changed] if changed else [], [head, *rows]


def _said(settings: Mapping[str, Any], key: str) -> str:
    return setting_words(settings[key]) if key in settings else "-"


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{above}.{name}" if above else str(name)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, key)
        else:
            yield key, value

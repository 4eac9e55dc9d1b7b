"""What a run's defence bought and cost, in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_app.audit.leakage_log import read_lines
from fl_app.audit.rounds import read_accuracy
from fl_app.config import Config, ConfigError, from_yaml
from fl_app.protocol import Defense
from fl_app.runs.folder import list_runs
from fl_app.util.reading import BrokenFileError

_Scores = dict[tuple[object, ...], float]


def defense_advice(run_dir: Path) -> str:
    """Say how much PSNR a run's defence took from the attacks, and what accuracy it cost.

    Beside it stand the mean-colour baseline and, where there is one, the latest undefended
    run of the same setting: the same attacks on the same clients in the same
    rounds; a sum over clients is set against the mean over single ones. Accuracy
    is that of the last round's global model.

    Parameters
    ----------
    run_dir : Path
        A run's folder; the runs beside it are looked through.

    Returns
    -------
    str
        Nothing where the run has no defence, or no attack on it was scored.
    """
    config = from_yaml(run_dir / "config.yaml")
    lines = _scored(run_dir)
    if config.defense == Defense() or not lines:
        return ""
    known = "known" if config.audit.defense == "given" else "unknown"
    words = f"Defence {config.defense} ({known} to the attacker): mean PSNR "
    other = _undefended(run_dir, config)
    summed = config.defense.secagg
    ours = _by_key(lines, summed)
    theirs = _by_key(_scored(other), summed) if other else {}
    both = ours.keys() & theirs.keys()
    if other and both:
        kept = [line for line in lines if _key(line, summed) in both]
        defended, plain = (_mean([scores[key] for key in both]) for scores in (ours, theirs))
        words += f"{defended:.1f} dB, undefended {plain:.1f} dB (run {other.name}), "
        words += f"the mean colour {_baseline(kept):.1f} dB: {_bought(plain - defended)}"
        return f"{words}; {_cost(run_dir, other)}."
    mean, baseline = _mean(list(ours.values())), _baseline(lines)
    where = "above" if mean > baseline else "below"
    words += f"{mean:.1f} dB, {abs(mean - baseline):.1f} dB {where} "
    return words + (
        f"the mean colour ({baseline:.1f} dB). No undefended run of the same setting is there: "
        "what it bought and cost is open."
    )


def _undefended(run_dir: Path, config: Config) -> Path | None:
    """Return the latest run that differs from this one in its defence alone."""
    wanted = _setting(config)
    for other in reversed(list_runs(run_dir.parent)):
        try:
            theirs = from_yaml(other / "config.yaml")
        except ConfigError:  # of another version
            continue
        if theirs.defense == Defense() and _setting(theirs) == wanted and _scored(other):
            return other
    return None


def _setting(config: Config) -> Config:
    audit = replace(config.audit, defense="given")
    return replace(config, name="any", runs_dir="", defense=Defense(), audit=audit)


def _scored(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_lines(run_dir / "leakage.jsonl")[0]
    found = ((line, line["metrics"].get("psnr")) for line in lines)
    return [line for line, psnr in found if psnr and None not in (psnr["mean"], psnr["baseline"])]


def _key(line: dict[str, Any], summed: bool) -> tuple[object, ...]:
    """Return what makes two lines comparable."""
    options = json.dumps(line["options"], sort_keys=True)
    return line["attack"], options, line["round"], None if summed else line["client"]


def _by_key(lines: Sequence[dict[str, Any]], summed: bool) -> _Scores:
    scores: dict[tuple[object, ...], list[float]] = {}
    for line in lines:
        scores.setdefault(_key(line, summed), []).append(line["metrics"]["psnr"]["mean"])
    return {key: _mean(values) for key, values in scores.items()}


def _bought(gain: float) -> str:
    return f"it bought {gain:.1f} dB" if gain >= 0.05 else "it bought nothing"


def _cost(run_dir: Path, other: Path) -> str:
    ours, theirs = _accuracy(run_dir), _accuracy(other)
    if ours is None or theirs is None:
        return "accuracy was not measured in both"
    lost = 100 * (theirs - ours)
    words = f"cost {lost:.1f} points of accuracy" if lost > 0 else "cost no accuracy"
    return f"it {words} ({100 * ours:.1f}% for {100 * theirs:.1f}%)"


def _accuracy(run_dir: Path) -> float | None:
    """Return the accuracy after a run's last round, None where it is not known."""
    try:
        rounds = read_accuracy(run_dir)
    except BrokenFileError:
        return None
    return rounds[max(rounds)] if rounds else None


def _baseline(lines: Sequence[dict[str, Any]]) -> float:
    return _mean([line["metrics"]["psnr"]["baseline"] for line in lines])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""The table of `flowleak bench defenses`: what defences cost and what they buy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from client_app.training import NO_DEFENSE
from fl_app.audit.exposure import count_words
from fl_app.benchmarks.accuracy import Accuracies
from fl_app.benchmarks.attack_results import AttackResults, gain_words
from fl_app.benchmarks.case import Case
from fl_app.util.intervals import spread_words, with_interval

METRICS = {"psnr": ("PSNR dB", 1), "ssim": ("SSIM", 3), "lpips_vgg": ("LPIPS VGG", 3)}
"""Each metric's heading, and its digits after the point."""
LOWER = ("lpips_vgg",)
"""Metrics of which an attacker wants less."""
_COLUMNS = [
    "client", "labels", "defence", "attack", "attacker knows", "trials", "identified",
    "PSNR dB", "mean colour dB", "SSIM", "LPIPS VGG", "accuracy", "cost in points (seeds)",
    "update changed by", "bytes",
]  # fmt: skip


def defense_cells(results: AttackResults, accuracies: Accuracies) -> list[list[str]]:
    """Return the lines of the table, its head first: a line a case that was run.

    Leakage with its 95% interval over trials; the accuracy of the federation, and
    the points that it lost to the undefended one of the same seeds, and their number.
    """
    lines = [list(_COLUMNS)]
    for case in results.cases:
        rows, summary = results.of(case), results.summary(case)
        if not rows:
            continue
        undefended = replace(case, defense=NO_DEFENSE)
        accuracy, lost = _cost(case, accuracies)
        knows = "-" if case.defense == NO_DEFENSE else "yes" if case.defense_known else "no"
        changed = sum(row["distortion"] for row in rows) / len(rows)
        size = sum(row["update_bytes"] for row in rows) / len(rows)
        lines.append(
            [
                undefended.client,
                case.labels,
                str(case.defense),
                f"{case.attack.name} x{case.attack.iterations}",
                knows,
                str(len(rows)),
                count_words(summary["identified"]),
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
    score, digits = summary.get(metric), METRICS[metric][1]
    return spread_words(score, digits) if score else "-"


def _cost(case: Case, accuracies: Accuracies) -> tuple[str, str]:
    """Return a case's accuracy and what its defence cost, in words."""
    ours = accuracies.of(case)
    if not ours:
        return "-", "-"
    accuracy = f"{100 * sum(ours.values()) / len(ours):.1f}%"
    theirs = accuracies.of(replace(case, defense=NO_DEFENSE))
    lost = [100 * (theirs[number] - ours[number]) for number in ours if number in theirs]
    if case.defense == NO_DEFENSE or not lost:
        return accuracy, "-"
    return accuracy, f"{with_interval(lost, 1, (-100.0, 100.0))} ({len(lost)})"


def compare_with_sme(results: AttackResults) -> list[str]:
    """Say, for each client and defence, on which metrics flow_matching is above SME.

    Above: its 95% interval over trials is on the better side of SME's and does
    not overlap it; with too few trials for intervals (`spread`) nothing is. Beside it by
    how much, trial by trial: what makes a trial hard is the same for both.
    """
    by_side: dict[str, dict[str, Case]] = {}
    for case in results.cases:
        by_side.setdefault(case.client, {}).setdefault(case.attack.name, case)
    lines = []
    for client, attacks in by_side.items():
        if not {"flow_matching", "sme"} <= attacks.keys():
            continue
        pair = attacks["flow_matching"], attacks["sme"]
        ours, theirs = map(results.summary, pair)
        if not ours["trials"] or not theirs["trials"]:
            continue
        above = [METRICS[m][0] for m in METRICS if _is_above(ours.get(m), theirs.get(m), m)]
        words = ", ".join(above) or "no metric"
        line = f"- {client}: flow_matching is above sme, intervals apart, on {words}"
        gains = {
            name: gain_words(results.gain(*pair, m), digits)
            for m, (name, digits) in METRICS.items()
        }
        pairs = ", ".join(f"{name} {gain}" for name, gain in gains.items() if gain)
        lines.append(f"{line}; trial by trial {pairs}." if pairs else f"{line}.")
    return lines


def _is_above(
    ours: Mapping[str, float] | None, theirs: Mapping[str, float] | None, metric: str
) -> bool:
    if not ours or not theirs or None in (ours["low"], theirs["low"]):
        return False
    if metric in LOWER:
        return ours["high"] < theirs["low"]
    return ours["low"] > theirs["high"]

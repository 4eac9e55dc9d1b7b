"""Benchmarks: `flowleak bench NAME`, the command behind every figure of the project.

A benchmark is a list of cases, see `bench_cases`. A case is run on draws: each
draw takes fresh images and a fresh model, trains one client as Flower's clients
train, attacks the update that a server would see, and scores the result against
the truth. Cases of one client share its draws, so they are compared in pairs.
Rows are kept in a JSON file after every draw, so a killed benchmark goes on
where it was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from client_app.defenses import distortion, update_bytes
from client_app.training import NO_DEFENSE, normalise
from fl_app.audit.metrics import (
    MEASURES,
    feature_mse,
    mean_interval,
    score,
    target_features,
)
from fl_app.audit.perceptual import load_lpips
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.processes import in_processes, shares
from fl_app.benchmarks.rows import commits, kept_rows, with_commit
from fl_app.benchmarks.table import machine, results_markdown
from fl_app.config import PriorConfig
from fl_app.data import ImageSet
from fl_app.protocol import DatasetInfo, Knowledge, Observation
from fl_app.util.files import write_text
from fl_app.util.markdown import half_width, signed
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.run import create_attack, run_attack

_COLUMNS = [
    "client", "attack", "draws", "PSNR dB", "bar", "grey dB", "PSNR by local step",
    "SSIM", "LPIPS VGG", "vs first dB", "vs first LPIPS", "loss", "at truth", "s", "it/s", "MB",
]  # fmt: skip

_ON_SCREEN = (
    "client", "attack", "draws", "PSNR dB", "bar", "grey dB", "LPIPS VGG", "vs first dB", "s",
)  # fmt: skip

_MEANS = (
    "loss", "loss_at_truth", "seconds", "iterations_per_second", "peak_memory",
    "gflop_per_iteration",
)  # fmt: skip


@dataclass(frozen=True)
class _Setting:
    """What every measurement of a benchmark shares."""

    info: DatasetInfo
    images: ImageSet
    prior: PriorConfig
    lpips_weights: str
    train_images: ImageSet | None

    def draw(self, case: Case, seed: int) -> tuple[Observation, Knowledge, Truth]:
        """See `draw_client`."""
        return draw_client(case, self.images, self.info, seed, self.train_images)


_perceptual = cache(load_lpips)


def _measure(setting: _Setting, case: Case, seed: int) -> dict[str, Any]:
    """Return the row of one draw, measured in a worker process.

    Its ``peak_memory`` (the column MB) is the attack's alone, see `Reconstruction`.
    """
    observation, knowledge, truth = setting.draw(case, seed)
    seen = knowledge if case.labels_known else replace(knowledge, labels=None)
    seen = seen if case.defense_known else replace(seen, defense=NO_DEFENSE)
    found = run_attack(observation, seen, case.attack, setting.prior, seed)
    attack = create_attack(case.attack)
    options = {option.name: getattr(attack, option.name) for option in attack.options()}
    distance = options.get("distance", "cosine")
    objective = matching_objective(options["matching"], observation, knowledge, distance=distance)
    private = normalise(truth.images, knowledge.mean, knowledge.std)
    at_truth = objective(private, 1.0).item()
    perceptual, reasons = _perceptual(setting.lpips_weights)
    measures = {
        **MEASURES,
        **perceptual,
        "fmse": feature_mse(target_features(observation, knowledge)),
    }
    leakage = score(found, truth, knowledge.mean, measures, reasons, knowledge.num_classes)
    size, encoding = update_bytes(observation.update, case.defense.quantize)
    return {
        "case": case.name,
        "seed": seed,
        "distortion": _distortion(setting, case, seed, observation),
        "update_bytes": size,
        "update_encoding": encoding,
        "matching": found.matching,
        "options": dict(found.options),
        "metrics": {k: v and asdict(v) for k, v in leakage.metrics.items()},
        "psnr_by_step": leakage.psnr_by_step,
        "reasons": dict(leakage.reasons),
        "loss": found.losses[-1],
        "loss_at_truth": at_truth,
        "diagnosis": found.diagnosis,
        "iterations": found.iterations,
        "seconds": found.seconds,
        "iterations_per_second": found.iterations / found.seconds,
        "peak_memory": found.peak_memory,
        "gflop_per_iteration": found.flops / found.iterations / 1e9,
    }


def _distortion(setting: _Setting, case: Case, seed: int, observation: Observation) -> float:
    """Return how far the case's defence moved the update, see `distortion`."""
    # Of the same model: what is in it is no step on the update.
    bare = replace(NO_DEFENSE, precode=case.defense.precode, dropout=case.defense.dropout)
    if case.defense == bare:
        return 0.0
    undefended = setting.draw(replace(case, defense=bare), seed)[0]
    return distortion(undefended.update, observation.update)


@dataclass
class Benchmark:
    """A benchmark's rows, kept in a file.

    Attributes
    ----------
    name : str
    cases : sequence of Case
    info : DatasetInfo
    images : ImageSet
    facts : mapping
        What the results depend on beside the cases, the commit among them; a file
        with other facts is not resumed, see `kept_rows`.
    path : Path or None
        Where the rows are kept; None: nowhere.
    prior : PriorConfig
    lpips_weights : str
        See `load_lpips`.
    train_images : ImageSet or None
        See `draw_client`.
    """

    name: str
    cases: Sequence[Case]
    info: DatasetInfo
    images: ImageSet
    facts: Mapping[str, Any]
    path: Path | None = None
    prior: PriorConfig = field(default_factory=PriorConfig)
    lpips_weights: str = ""
    train_images: ImageSet | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            self.rows = kept_rows(self.path, self.facts)

    def run(
        self, draws: int, seed: int, console: Console, workers: int = 1, only: str = ""
    ) -> None:
        """Run every case on every draw that has no row yet, draw by draw.

        Parameters
        ----------
        draws : int
            Draws of every case; 0: none, the rows stay as they are.
        seed : int
            Of the first draw.
        console : Console
            Shows the progress.
        workers : int
            See `in_processes`.
        only : str
            See `chosen`.

        Raises
        ------
        ValueError
            As `chosen`.
        """
        chosen = self.chosen(only)
        done = {(row["case"], row["seed"]) for row in self.rows}
        todo = [
            (case, number)
            for number in range(seed, seed + draws)
            for case in chosen
            if (case.name, number) not in done
        ]
        if not todo:
            return
        setting = _Setting(
            self.info, self.images, self.prior, self.lpips_weights, self.train_images
        )
        self.facts = {**self.facts, **shares(workers)}
        for row in in_processes(_measure, setting, todo, workers, self.name, console):
            self.rows.append(with_commit(row, self.facts))
            self.save()

    @property
    def draws(self) -> int:
        """Draws of the case that has the most of them."""
        return max(Counter(row["case"] for row in self.rows).values(), default=0)

    def chosen(self, only: str = "") -> list[Case]:
        """Return the cases in whose name the regular expression `only` is found.

        Raises
        ------
        ValueError
            If there is no such case, or it is no regular expression.
        """
        try:
            found = [case for case in self.cases if re.search(only, case.name)]
        except re.error as error:
            raise ValueError(f"cases is {only!r}: no regular expression, {error}") from error
        if not found:
            raise ValueError(
                f"cases is {only!r}: no case of {self.name} has it in its name; a name is like "
                f"{self.cases[0].name!r}"
            )
        return found

    def save(self) -> None:
        """Write facts, machine, summary and rows, whole or not at all."""
        if self.path:
            content = {
                "benchmark": self.name,
                "facts": self._all_facts(),
                "machine": machine(),
                "summary": [self.summary(case) for case in self.cases],
                "rows": self.rows,
            }
            write_text(self.path, json.dumps(content, indent=1) + "\n")

    def summary(self, case: Case) -> dict[str, Any]:
        """Return a case's means and 95% intervals over draws, beside its baselines."""
        rows = [row for row in self.rows if row["case"] == case.name]
        entry: dict[str, Any] = {"case": case.name, "draws": len(rows), "bar": case.bar}
        if not rows:
            return entry
        for metric in rows[0]["metrics"]:
            scores = [row["metrics"][metric] for row in rows]
            if None in scores:
                entry[metric] = None
                continue
            mean, low, high = mean_interval([s["mean"] for s in scores])
            grey = mean_interval([s["baseline"] for s in scores])[0]
            entry[metric] = {"mean": mean, "low": low, "high": high, "baseline": grey}
        steps = zip(*(row["psnr_by_step"] for row in rows), strict=True)
        # Steps of later passes use no new image.
        entry["psnr_by_step"] = [sum(v) / len(v) for v in steps if None not in v]
        for key in _MEANS:
            entry[key] = sum(row[key] for row in rows) / len(rows)
        reference = self.reference(case)
        if reference:
            entry["compared_with"] = reference.name
            entry["gain"] = {
                metric: self.gain(case, reference, metric) for metric in ("psnr", "lpips_vgg")
            }
        return entry

    def reference(self, case: Case) -> Case | None:
        """Return what a case is compared with: the first of its client and its budget.

        None for that one itself.
        """
        first = next(other for other in self.cases if other.arena == case.arena)
        return None if first.name == case.name else first

    def gain(self, case: Case, reference: Case, metric: str) -> dict[str, float | None] | None:
        """Return mean and 95% interval of a metric's difference on the draws that both have.

        None: they have none in common.
        """
        scores: list[dict[int, float]] = [{}, {}]
        for kept, name in zip(scores, (case.name, reference.name), strict=True):
            for row in self.rows:
                if row["case"] == name and row["metrics"].get(metric):
                    kept[row["seed"]] = row["metrics"][metric]["mean"]
        differences = [scores[0][seed] - scores[1][seed] for seed in scores[0] if seed in scores[1]]
        if not differences:
            return None
        mean, low, high = mean_interval(differences)
        return {"mean": mean, "low": low, "high": high}

    def table(self) -> Table:
        """Return the summary's main columns for a screen: means with 95% intervals."""
        table = Table(title=f"{self.name}: mean over draws, 95% interval")
        shown = [place for place, name in enumerate(_COLUMNS) if name in _ON_SCREEN]
        for place in shown:
            words = _COLUMNS[place] in ("client", "attack")
            width = 18 if words else None
            table.add_column(_COLUMNS[place], min_width=width, overflow="fold", no_wrap=not words)
        for cells in self._cells():
            table.add_row(*(cells[place] for place in shown))
        return table

    def markdown(self, command: str, notes: Sequence[str] = ()) -> str:
        """Return the summary in Markdown, with the command that makes it and notes below."""
        cells = [_COLUMNS, *self._cells()]
        return results_markdown(self.name, command, cells, self._all_facts(), notes)

    def _all_facts(self) -> dict[str, Any]:
        return {**self.facts, "commit": commits(self.rows)}

    def _cells(self) -> list[list[str]]:
        rows = []
        for case in self.cases:
            line = self.summary(case)
            if not line["draws"]:
                continue
            psnr, gain = line["psnr"], line.get("gain", {})
            beaten = psnr["mean"] > psnr["baseline"]
            rows.append(
                [
                    case.client,
                    case.name.split(", ", 1)[1],
                    str(line["draws"]),
                    f"{psnr['mean']:.2f}{half_width(psnr, 1)}"
                    + ("" if beaten else " (no better than grey)"),
                    _bar(case),
                    f"{psnr['baseline']:.1f}",
                    " ".join(f"{value:.1f}" for value in line["psnr_by_step"]),
                    f"{line['ssim']['mean']:.3f}",
                    f"{line['lpips_vgg']['mean']:.3f}" if line.get("lpips_vgg") else "-",
                    signed(gain.get("psnr"), 2),
                    signed(gain.get("lpips_vgg"), 3),
                    f"{line['loss']:.3f}",
                    f"{line['loss_at_truth']:.3f}",
                    f"{line['seconds']:.0f}",
                    f"{line['iterations_per_second']:.1f}",
                    f"{line['peak_memory'] / 1e6:.0f}",
                ]
            )
        return rows

    def shortfalls(self) -> list[str]:
        """Return, in words, every bar that a case which was run falls short of."""
        short = []
        for case in self.cases:
            line = self.summary(case)
            if not line["draws"]:
                continue
            if case.bar is not None and line["psnr"]["mean"] < case.bar:
                reached = f"{line['psnr']['mean']:.2f} dB"
                short.append(f"{case.name}: {reached}, the bar is {case.bar:g} dB")
            above = line["psnr"]["mean"] - line["psnr"]["baseline"]
            if case.above_mean_colour is not None and above < case.above_mean_colour:
                reached = f"{above:+.2f} dB above grey"
                short.append(f"{case.name}: {reached}, the bar is {case.above_mean_colour:+g} dB")
            for other in self.cases if case.first else ():
                rival = self.summary(other).get("psnr") if other.arena == case.arena else None
                if rival and rival["mean"] > line["psnr"]["mean"]:
                    reached = f"{line['psnr']['mean']:.2f} dB"
                    short.append(
                        f"{case.name}: {reached}, but {rival['mean']:.2f} dB by {other.attack.name}"
                    )
            if case.gain is not None:
                psnr, lpips = line["gain"]["psnr"], line["gain"]["lpips_vgg"]
                if not psnr or psnr["mean"] < case.gain:
                    reached = signed(psnr, 2) or "no draws in common"
                    short.append(f"{case.name}: {reached}, the bar is {case.gain:+g} dB")
                if not lpips or lpips["mean"] >= 0:
                    reached = signed(lpips, 3) or "not measured"
                    short.append(f"{case.name}: LPIPS VGG {reached}, the bar is below 0")
        return short


def _bar(case: Case) -> str:
    words = [] if case.bar is None else [f"{case.bar:g}"]
    words += [] if case.above_mean_colour is None else [f"grey {case.above_mean_colour:+g}"]
    words += [] if case.gain is None else [f"{case.gain:+g} dB, LPIPS lower"]
    words += ["first"] * case.first
    return "; ".join(words)

"""The results of attacks: who is exposed, what they are compared with, and thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fl_app.audit.exposure import (
    bounds_of,
    chance_words,
    count_words,
    identified_of,
    mean_single_colour,
    recognised_of,
    summary_over,
    verdict,
)
from fl_app.benchmarks.case import RECOGNISED, Case
from fl_app.benchmarks.results import Results
from fl_app.util.intervals import FEWEST, Spread, spread, spread_words

_COLUMNS = [
    "client", "labels", "accuracy", "attack", "trials", "identified", "among", "recognisable",
    "PSNR dB", "median", "worst tenth", "threshold", "mean colour dB", "single colour dB",
    "over 20 dB", "PSNR by local step",
    "SSIM", "LPIPS VGG", "vs first dB", "vs first LPIPS", "loss", "at truth", "s", "it/s", "MB",
]  # fmt: skip

_ON_SCREEN = (
    "client", "labels", "accuracy", "attack", "trials", "identified", "PSNR dB", "worst tenth",
    "threshold", "mean colour dB", "single colour dB", "LPIPS VGG", "vs first dB", "s",
)  # fmt: skip

_MAIN = (
    "client", "labels", "accuracy", "attack", "trials", "PSNR dB", "mean colour dB", "identified",
    "among", "SSIM", "LPIPS VGG", "vs first dB", "threshold", "s",
)  # fmt: skip

_MEANS = (
    "loss", "loss_at_truth", "seconds", "iterations_per_second", "peak_memory",
    "gflop_per_iteration",
)  # fmt: skip


@dataclass
class AttackResults(Results):
    """The rows of attacks: a case that was run is a line of the table."""

    def summaries(self) -> dict[str, Any]:
        """Return the summary of every case."""
        return {"summary": [self.summary(case) for case in self.cases]}

    def summary(self, case: Case) -> dict[str, Any]:
        """Return a case's means with intervals over trials (`spread`), beside its baselines.

        Median and worst tenth (`summary_over`) are over the images of all trials.
        """
        rows = self.of(case)
        entry: dict[str, Any] = {
            "case": case.name, "trials": len(rows), "threshold": case.threshold,
        }  # fmt: skip
        if not rows:
            return entry
        for metric in rows[0]["metrics"]:
            scores = [row["metrics"][metric] for row in rows]
            if None in scores:
                entry[metric] = None
                continue
            entry[metric] = {
                **spread([s["mean"] for s in scores], bounds_of(metric)),
                **summary_over(metric, scores),
                "baseline": sum(s["baseline"] for s in scores) / len(scores),
            }
        values = [value for row in rows for value in row["metrics"]["psnr"]["values"]]
        entry["recognised"] = sum(value > RECOGNISED for value in values), len(values)
        entry["identified"] = identified_of(rows)
        entry["recognisable"] = recognised_of(rows)
        entry["single_colour"] = mean_single_colour(rows)
        entry["accuracy"] = rows[0].get("accuracy")
        steps = zip(*(row["psnr_by_step"] for row in rows), strict=True)
        # Steps of later passes use no new image.
        entry["psnr_by_step"] = [sum(v) / len(v) for v in steps if None not in v]
        for key in _MEANS:
            means = [row[key] for row in rows]
            entry[key] = None if None in means else sum(means) / len(means)
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

    def gain(self, case: Case, reference: Case, metric: str) -> Spread | None:
        """Return a metric's difference on the trials that both have, see `spread`.

        None: they have none in common.
        """
        ours, theirs = (
            {row["seed"]: row["metrics"][metric]["mean"] for row in self.of(each)
             if row["metrics"].get(metric)}
            for each in (case, reference)
        )  # fmt: skip
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        return spread(differences) if differences else None

    def table(self) -> Table:
        """Return the table's main columns for a screen."""
        words = f"95% interval from {FEWEST} on; worst tenth: of all images, those that leak most"
        table = Table(title=f"{self.name}: mean over trials, {words}")
        head, *lines = _chosen(self.cells(), _ON_SCREEN)
        for name in head:
            wide = name in ("client", "attack")
            width = 18 if wide else None
            table.add_column(name, min_width=width, overflow="fold", no_wrap=not wide)
        for line in lines:
            table.add_row(*line)
        return table

    def cells(self) -> list[list[str]]:
        """Return the lines of the table, its head first: a line a case that was run."""
        return [_COLUMNS, *(self._line(case) for case in self.cases if self.of(case))]

    def main_cells(self) -> list[list[str]]:
        """See `Results`."""
        return _chosen(self.cells(), _MAIN)

    def _line(self, case: Case) -> list[str]:
        line = self.summary(case)
        psnr, gain = line["psnr"], line.get("gain", {})
        found, colour = line["identified"], line["single_colour"]
        words = verdict(psnr["mean"], psnr["baseline"], colour)
        return [
            case.client,
            case.labels,
            f"{line['accuracy']:.0%}" if line["accuracy"] else "untrained",
            case.attack_words,
            str(line["trials"]),
            count_words(found),
            chance_words(found) if found else "-",
            count_words(line["recognisable"]),
            spread_words(psnr, 2) + (f" ({words})" if words else ""),
            f"{psnr['median']:.1f}",
            f"{psnr['worst_tenth']:.1f}",
            _threshold(case),
            f"{psnr['baseline']:.1f}",
            "-" if colour is None else f"{colour:.1f}",
            "{} of {}".format(*line["recognised"]),
            " ".join(f"{value:.1f}" for value in line["psnr_by_step"]),
            spread_words(line["ssim"], 3),
            spread_words(line["lpips_vgg"], 3) if line.get("lpips_vgg") else "-",
            gain_words(gain.get("psnr"), 2),
            gain_words(gain.get("lpips_vgg"), 3),
            f"{line['loss']:.3f}",
            "" if line["loss_at_truth"] is None else f"{line['loss_at_truth']:.3f}",
            f"{line['seconds']:.0f}",
            f"{line['iterations_per_second']:.1f}",
            f"{line['peak_memory'] / 1e6:.0f}",
        ]

    def shortfalls(self) -> list[str]:
        """Return, in words, every threshold that a case which was run misses."""
        return [
            f"{case.name}: {words}"
            for case in self.cases
            if self.of(case)
            for words in self._misses(case)
        ]

    def _misses(self, case: Case) -> Iterator[str]:
        line = self.summary(case)
        psnr = line["psnr"]["mean"]
        if case.threshold is not None and psnr < case.threshold:
            yield f"{psnr:.2f} dB, the threshold is {case.threshold:g} dB"
        above = psnr - line["psnr"]["baseline"]
        if case.above_mean_colour is not None and above < case.above_mean_colour:
            wanted = f"the threshold is {case.above_mean_colour:+g} dB"
            yield f"{above:+.2f} dB above the mean colour, {wanted}"
        over, of = line["recognised"]
        if case.recognised is not None and over < case.recognised * of:
            words = f"{over} of {of} images over {RECOGNISED:g} dB"
            yield f"{words}, the threshold is {case.recognised:.0%}"
        found = line["identified"]
        if case.identified is not None and found and found["count"] < case.identified * found["of"]:
            yield f"{count_words(found)} identified, the threshold is {case.identified:.0%}"
        if case.within is not None and line["gain"]["psnr"]:
            gain = line["gain"]["psnr"]["mean"]
            if gain < -case.within:
                yield f"{gain:+.2f} dB to its first, the threshold is {-case.within:+g} dB"
        for other in self.cases if case.first else ():
            rival = self.summary(other).get("psnr") if other.arena == case.arena else None
            if rival and rival["mean"] > psnr:
                yield f"{psnr:.2f} dB, but {rival['mean']:.2f} dB by {other.attack.name}"
        if case.gain is not None:
            gains, lpips = line["gain"]["psnr"], line["gain"]["lpips_vgg"]
            if not gains or gains["mean"] < case.gain:
                reached = gain_words(gains, 2) or "no trials in common"
                yield f"{reached}, the threshold is {case.gain:+g} dB"
            if not lpips or lpips["mean"] >= 0:
                reached = gain_words(lpips, 3) or "not measured"
                yield f"LPIPS VGG {reached}, the threshold is below 0"


def _chosen(cells: list[list[str]], columns: Sequence[str]) -> list[list[str]]:
    """Return some columns of a table, in their order."""
    places = [cells[0].index(name) for name in columns]
    return [[line[place] for place in places] for line in cells]


def gain_words(gain: Spread | None, digits: int) -> str:
    """Return a paired difference in words; nothing where there is none."""
    return spread_words(gain, digits, sign="+") if gain else ""


def _threshold(case: Case) -> str:
    words = [] if case.threshold is None else [f"{case.threshold:g}"]
    if case.above_mean_colour is not None:
        words.append(f"mean colour {case.above_mean_colour:+g}")
    if case.recognised is not None:
        words.append(f"{case.recognised:.0%} over {RECOGNISED:g} dB")
    words += [] if case.identified is None else [f"{case.identified:.0%} identified"]
    words += [] if case.within is None else [f"first {-case.within:+g} dB"]
    words += [] if case.gain is None else [f"{case.gain:+g} dB, LPIPS lower"]
    words += ["first"] * case.first
    return "; ".join(words)

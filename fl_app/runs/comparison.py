"""The comparison: attacks on a run's updates, with equal budgets, beside what needs no update."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_app.audit.comparison import compare, save_comparison_picture
from fl_app.audit.exposure import chance_words, count_words, verdict
from fl_app.audit.on_line import OnLine
from fl_app.config import UNBOUNDED, AttackConfig, ConfigError, load_config
from fl_app.registry import ATTACKS
from fl_app.runs.attacking import finish_attacks
from fl_app.runs.facts import open_auditor
from fl_app.runs.folder import git_commit
from fl_app.runs.lock import only_one
from fl_app.util.files import write_text
from fl_app.util.intervals import FEWEST, spread_words
from fl_app.util.machine import host
from fl_app.util.markdown import markdown_table, sections_markdown
from fl_app.util.tables import Fitting
from fl_app.util.text import printable
from server_strategies.attack_pool import QueueEntry, enqueue
from server_strategies.attacks.run import create_attack
from server_strategies.observations import ObservationStore

# A metric's heading, and its digits. Those of other names follow, by their names.
_METRICS = {
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 3),
    "lpips_vgg": ("LPIPS VGG", 3),
    "lpips_alex": ("LPIPS Alex", 3),
    "mse": ("MSE", 4),
    "fmse": ("FMSE", 4),
    "tv": ("TV", 3),
    "prior_residual": ("prior residual", 3),
    "label_accuracy": ("labels right", 2),
}
_TOLD: dict[str, Any] = {"style": "yellow", "markup": False, "highlight": False, "soft_wrap": True}
# By pixels, by looks, and what needs no truth.
_ON_SCREEN = ("", "done", "identified", "PSNR dB", "worst tenth", "LPIPS VGG", "TV", "s", "note")
_OF_IMAGES = ("median", "worst tenth", "single colour")  # of PSNR, beside its mean


@dataclass(frozen=True)
class AttackComparison:
    """Attacks on every Observation of a run, each with the same budget.

    Attributes
    ----------
    attacks : tuple of AttackConfig
    budget : str
        As `budgeted` takes it.
    """

    attacks: tuple[AttackConfig, ...]
    budget: str

    @classmethod
    def of(cls, names: str, budget: str) -> AttackComparison:
        """Return the comparison of some attacks.

        Parameters
        ----------
        names : str
            Names of attacks with commas between, or ``all``.
        budget : str
            As `budgeted` takes it.

        Raises
        ------
        ConfigError
            If an attack is unknown, empty or named twice, or there is no such budget.
        """
        chosen = list(ATTACKS) if names == "all" else names.split(",")
        if not all(chosen):
            raise ConfigError(f"attack is {names!r}; allowed: a name before and after each comma")
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"attack is {names!r}; allowed: each attack once")
        attacks = tuple(budgeted(load_config({"attack": name}).attack, budget) for name in chosen)
        for attack in attacks:
            create_attack(attack)
        return cls(attacks, budget)

    def run(
        self,
        folder: Path,
        console: Console,
        client: Path | None = None,
        on_line: OnLine | None = None,
    ) -> None:
        """Run what has no line in the log, then write ``comparison.md``, ``.json`` and ``.png``.

        Parameters
        ----------
        folder : Path
            The run's; an earlier comparison's files there are replaced.
        console : Console
            Shows the progress and the table.
        client, on_line
            See `open_auditor`.

        Raises
        ------
        ConfigError
            If the run holds no Observation.
        """
        tell = partial(console.print, **_TOLD)
        auditor = open_auditor(folder, tell, client=client, on_line=on_line)
        store, config = ObservationStore(folder), auditor.config
        for bad in auditor.bad_lines():
            console.print(str(bad), style="yellow", markup=False, highlight=False, soft_wrap=True)
        jobs: dict[str, dict[str, str]] = {attack.name: {} for attack in self.attacks}
        with only_one(folder):
            logged = {line.get("job") for line in auditor.lines()}
            for id_ in store.ids():
                for attack in self.attacks:
                    entry = QueueEntry(id_, attack, config.prior, config.seed, "")
                    entry = replace(entry, id=_job_id(entry))
                    jobs[attack.name][id_] = entry.id
                    if entry.id not in logged:
                        enqueue(folder, entry)
        if not store.ids():
            raise ConfigError(f"{folder} holds no observation; watch.clients and watch.rounds do")
        finish_attacks(auditor, console)

        comparison = compare(auditor, store, jobs)
        summary = comparison.summary()
        names = ",".join(jobs)
        command = f"flowleak attack {folder.name} --attack {names} --budget {self.budget}"
        settings = {attack.name: asdict(attack) for attack in self.attacks}
        labels = config.audit.labels
        content = {
            "command": command,
            "budget": self.budget,
            "labels": labels,
            "settings": settings,
            **summary,
        }
        path = folder / "comparison.json"
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        cells = _cells(summary)
        lines = [*markdown_table(cells), "", *_notes(summary, self.budget, labels)]
        facts = {**host(), "commit": git_commit()}
        write_text(path.with_suffix(".md"), sections_markdown("Comparison", command, lines, facts))
        caption = [f"{folder.name}, budget: {self.budget}, labels {labels}"]
        save_comparison_picture(path.with_suffix(".png"), auditor, store, comparison, caption)
        console.print(_table(cells))
        for words in _failures(summary):
            console.print(words, style="yellow", markup=False, highlight=False, soft_wrap=True)
        for written in sorted(folder.glob("comparison.*")):
            console.print(written, soft_wrap=True, highlight=False)


def budgeted(attack: AttackConfig, budget: str) -> AttackConfig:
    """Return an attack with the budget of a comparison.

    Parameters
    ----------
    attack : AttackConfig
        With its authors' iterations.
    budget : str
        ``authors``: as it is; ``iterations=N``: N, however long they take;
        ``seconds=S``: as many as S seconds hold, with the schedules spread over them.

    Raises
    ------
    ConfigError
        If there is no such budget.
    """
    kind, _, number = budget.partition("=")
    try:
        if budget == "authors":
            return attack
        if kind == "iterations":
            return replace(attack, iterations=int(number), seconds=0.0)
        if kind == "seconds" and 0 < float(number) < math.inf:
            return replace(attack, iterations=UNBOUNDED, seconds=float(number))
    except ValueError:
        pass  # no number, or one below 1
    raise ConfigError(
        f"budget is {budget!r}; allowed: authors, iterations=N (1 or more), seconds=S (above 0)"
    )


def _job_id(entry: QueueEntry) -> str:
    """Return the same id for the same attack on the same update: by it a second call resumes."""
    facts = json.dumps([asdict(entry.attack), asdict(entry.prior), entry.seed], sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return f"{entry.observation}-{entry.attack.name}-{digest}"


def _cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the table: its head, a row a baseline, a row an attack."""
    baselines, attacks = summary["baselines"], summary["attacks"]
    found = [*baselines.values(), *(entry["metrics"] for entry in attacks.values())]
    there = dict.fromkeys(metric for metrics in found for metric in metrics)
    metrics = {name: look for name, look in _METRICS.items() if name in there}
    metrics |= {name: (name, 3) for name in there if name not in metrics}
    head = ["", "done", "identified", *(heading for heading, _ in metrics.values()), *_OF_IMAGES]
    rows = [[*head, "PSNR by local step", "s", "iterations", "MB", "GFLOP", "note"]]
    for name, scores in baselines.items():
        values = [_value(scores.get(metric), digits) for metric, (_, digits) in metrics.items()]
        rows.append([name, "", "", *values, *[""] * (len(_OF_IMAGES) + 5), "no attack"])
    for name, entry in attacks.items():
        values = [
            _value(entry["metrics"].get(metric), digits) for metric, (_, digits) in metrics.items()
        ]
        psnr = entry["metrics"].get("psnr", {})
        of_images = (psnr.get("median"), psnr.get("worst_tenth"), entry["single_colour"])
        rows.append(
            [
                name,
                f"{entry['succeeded']}/{len(summary['observations'])}",
                count_words(entry["identified"]),
                *values,
                *(_number(value, 1) for value in of_images),
                " ".join(_number(mean, 1) for mean in entry["psnr_by_step"]),
                _number(entry["seconds"], 1),
                _number(entry["iterations"], 0),
                _number(entry["peak_memory"], 0, 1e6),
                _number(entry["flops"], 0, 1e9),
                _note(entry),
            ]
        )
    return rows


def _value(score: Mapping[str, Any] | None, digits: int) -> str:
    """Return a mean and its interval in words."""
    if not score:
        return "-"
    return spread_words({**score, "values": list(score["values"].values())}, digits)


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _note(entry: Mapping[str, Any]) -> str:
    """Say what else a row has to say: that it is no reconstruction, was cut, or failed."""
    words = []
    psnr = entry["metrics"].get("psnr")
    if psnr and psnr["chance"]:
        name = max(psnr["chance"], key=lambda baseline: psnr["chance"][baseline])
        if psnr["mean"] <= psnr["chance"][name]:
            words.append(f"no better than {name}")
        elif no_structure := verdict(psnr["mean"], None, entry["single_colour"]):
            words.append(no_structure)
    if entry["identified"]:
        words.append(f"identified: {chance_words(entry['identified'])}")
    labels = entry["metrics"].get("label_accuracy")
    if labels:
        words += [f"{value:.2f} of the labels {name}" for name, value in labels["chance"].items()]
    words += [
        f"{count} of {entry['succeeded']} ended by {reason}"
        for reason, count in entry["stop_reasons"].items()
        if reason != "iterations"
    ]
    if entry["failures"]:
        words.append(f"{len(entry['failures'])} failed")
    return "; ".join(words)


def _notes(summary: Mapping[str, Any], budget: str, labels: str) -> list[str]:
    """Return the lines below the table: what it shows, and what is missing and why."""
    count = len(summary["observations"])
    lines = [
        f"- Observations: {count}; each value is the mean over an observation's images, then over "
        f"observations, with its 95% interval from {FEWEST} on and their values below. An attack's "
        "rows are over those where it succeeded.",
        "- Median and worst tenth (the tenth that leaks most) of the PSNR are over the images of "
        "all observations; single colour: PSNR of each image's own mean colour, below which an "
        "image shows no structure.",
        "- One assignment of reconstructions to private images (least MSE) serves all metrics, for "
        "attacks and baselines alike. What is no better than the best baseline in PSNR is no "
        "reconstruction.",
        f"- Labels: {labels} (what attacks were given of them). Budget: {budget}. Costs are means "
        "over observations.",
    ]
    lines += [f"- {printable(f'{name}: {why}')}" for name, why in summary["reasons"].items()]
    return lines + [f"- {words}" for words in _failures(summary)]


def _failures(summary: Mapping[str, Any]) -> list[str]:
    """Say which attacks failed on which observations, and why."""
    return [
        printable(f"{name} failed on {failure['observation']}: {failure['error']}")
        for name, entry in summary["attacks"].items()
        for failure in entry["failures"]
    ]


def _table(cells: Sequence[Sequence[str]]) -> Fitting:
    """Return what of the table fits 80 columns; comparison.md has all of it."""
    table = Table(
        title="Comparison: mean over observations, 95% interval",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    shown = [column for column, name in enumerate(cells[0]) if name in _ON_SCREEN]
    for column in shown:
        table.add_column(cells[0][column], overflow="fold")
    for row in cells[1:]:
        table.add_row(*(Text(row[column]) for column in shown))
    return Fitting(table)

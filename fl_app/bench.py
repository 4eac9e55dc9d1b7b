"""Benchmarks: `flowleak bench NAME`, the command behind every figure of the project.

A benchmark is a list of cases. A case is run on draws: each draw takes fresh
images and a fresh model, trains one client as Flower's clients train, attacks
the update that a server would see, and scores the result against the truth.
Rows are kept in a JSON file after every draw, so a killed benchmark goes on
where it was.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from client_app.training import choose_batches, in_training_order, normalise, train
from fl_app.audit.metrics import (
    MEASURES,
    feature_mse,
    mean_interval,
    score,
    target_features,
)
from fl_app.audit.perceptual import load_lpips
from fl_app.audit.truth import Truth
from fl_app.config import AttackConfig, PriorConfig
from fl_app.data import ImageSet
from fl_app.files import write_text
from fl_app.models import create_model
from fl_app.processes import in_processes, shares
from fl_app.protocol import DatasetInfo, Knowledge, LocalTraining, Observation
from server_strategies.attacks import ATTACKS, run_attack
from server_strategies.attacks.explain import explain


@dataclass(frozen=True)
class Case:
    """One line of a benchmark's table.

    Attributes
    ----------
    training : LocalTraining
        `local_steps` above 0.
    attack : AttackConfig
    bar : float or None
        Mean PSNR in dB over the draws that the case has to reach.
    model : str
    num_examples : int
        Images that the client holds, N; 0: as many as it takes for one pass, K B.
    """

    training: LocalTraining
    attack: AttackConfig
    bar: float | None = None
    model: str = "convnet"
    num_examples: int = 0

    @property
    def count(self) -> int:
        """Images that the client trains on, N."""
        return self.num_examples or self.training.local_steps * self.training.batch_size

    @property
    def client(self) -> str:
        """The client's side in words."""
        t = self.training
        words = [f"{t.optimizer} {t.lr:g}"]
        for name in ("momentum", "weight_decay", "max_grad_norm"):
            words += [f"{name} {getattr(t, name):g}"] * bool(getattr(t, name))
        words += ["nesterov"] * t.nesterov
        words.append(f"K={t.local_steps} B={t.batch_size}")
        if t.passes(self.count) > 1:
            order = "reshuffled" if t.reshuffle else "in order"
            words.append(f"N={self.count} {t.passes(self.count)} passes {order}")
        return " ".join(words)

    @property
    def name(self) -> str:
        """Names the case in the results: everything that decides it but the draw."""
        options = "".join(f" {key}={value}" for key, value in sorted(self.attack.options.items()))
        return f"{self.client}, {self.attack.name}{options} x{self.attack.iterations}"


_ADAM = LocalTraining(optimizer="adam", lr=1e-3, local_steps=5)
_SGD = LocalTraining(optimizer="sgd", lr=0.01, local_steps=5)

BENCHMARKS: dict[str, tuple[Case, ...]] = {
    "quick": (
        Case(replace(_ADAM, batch_size=1), AttackConfig("flow_matching", 200), bar=21.5),
        Case(replace(_ADAM, batch_size=4), AttackConfig("flow_matching", 200), bar=21.0),
        Case(replace(_SGD, batch_size=4), AttackConfig("flow_matching", 200), bar=22.0),
        Case(
            replace(_SGD, batch_size=4),
            AttackConfig("flow_matching", 200, options={"explain": "surrogate"}),
        ),
        Case(replace(_SGD, batch_size=4), AttackConfig("sme", 300, options={"tv": 0.03}), bar=21.0),
    ),
}


def _explained() -> tuple[Case, ...]:
    """Return the cases of the benchmark `explain`: its bars, then every way to explain."""

    def flow(iterations: int, **options: str) -> AttackConfig:
        return AttackConfig("flow_matching", iterations, options=options)

    long = replace(_ADAM, local_steps=20, batch_size=4)
    cases = [
        Case(replace(_ADAM, local_steps=1, batch_size=4), flow(150), bar=28.0),
        Case(replace(_ADAM, batch_size=1), flow(300), bar=24.0),
        Case(replace(_ADAM, batch_size=4), flow(200)),
        Case(replace(_ADAM, batch_size=8), flow(150), bar=22.0),
        Case(replace(long, reshuffle=False), flow(80), bar=24.0, num_examples=20),
        Case(long, flow(80), bar=21.0, num_examples=20),
        Case(replace(_SGD, momentum=0.9, batch_size=4), flow(150), bar=23.0),
    ]
    for client, at_once in ((_SGD, "gradient"), (_ADAM, "inversion")):
        for steps in (1, 5, 20):
            kinds = ["surrogate", "trajectory", *([at_once, "sign"] if steps == 1 else [])]
            one_image = replace(client, local_steps=steps, batch_size=1, reshuffle=False)
            cases += [
                Case(one_image, flow(60, explain=kind), num_examples=min(steps, 5))
                for kind in kinds
            ]
    return tuple(cases)


BENCHMARKS["explain"] = _explained()


_COLUMNS = [
    "client", "attack", "draws", "PSNR dB", "bar", "grey dB", "PSNR by local step",
    "SSIM", "LPIPS VGG", "loss", "at truth", "s", "it/s", "MB",
]  # fmt: skip
_MEANS = (
    "loss", "loss_at_truth", "seconds", "iterations_per_second", "peak_memory",
    "gflop_per_iteration",
)  # fmt: skip


def draw_client(
    case: Case, images: ImageSet, info: DatasetInfo, seed: int
) -> tuple[Observation, Knowledge, Truth]:
    """Train one client from a freshly initialised model on freshly drawn images.

    Parameters
    ----------
    case : Case
    images : ImageSet
        To draw N images from, without replacement.
    info : DatasetInfo
    seed : int
        Decides the images and the model; the same for every case, so that cases
        with as many images are compared on the same ones.

    Raises
    ------
    ValueError
        If there are fewer than N images.
    """
    training, count = case.training, case.count
    if count > len(images):
        raise ValueError(f"{case.client} needs {count} images, the split holds {len(images)}")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(images), generator=generator)[:count]
    private, labels = images.images[picks].float() / 255, images.labels[picks]
    model = create_model(case.model, info.num_classes, info.image_shape, seed)
    w0 = {name: value.clone() for name, value in model.state_dict().items()}
    _, batches = in_training_order(choose_batches(count, training, generator))
    train(model, private, labels, [torch.tensor(b) for b in batches], training, info.mean, info.std)
    observation = Observation(w0, model.state_dict(), count, round=1, node=seed, client=seed)
    known = tuple(labels.tolist())
    knowledge = Knowledge(
        case.model, info.num_classes, info.image_shape, info.mean, info.std, training, known
    )
    return observation, knowledge, Truth(private, known, batches, round=1, node=seed)


@dataclass(frozen=True)
class _Setting:
    """What every measurement of a benchmark shares."""

    info: DatasetInfo
    images: ImageSet
    prior: PriorConfig
    lpips_weights: str


# Once a process: the networks are worth loading once only.
_perceptual = cache(load_lpips)


def _measure(setting: _Setting, case: Case, seed: int) -> dict[str, Any]:
    """Return the row of one draw, measured in a worker process.

    Its ``peak_memory`` (the column MB) is the attack's alone, see `Reconstruction`.
    """
    observation, knowledge, truth = draw_client(case, setting.images, setting.info, seed)
    found = run_attack(observation, knowledge, case.attack, setting.prior, seed)
    kind = case.attack.options.get("explain", ATTACKS[case.attack.name].options["explain"])
    explanation = explain(str(kind), observation, knowledge)
    private = normalise(truth.images, knowledge.mean, knowledge.std)
    at_truth = explanation(private, 1.0).item()
    perceptual, reasons = _perceptual(setting.lpips_weights)
    measures = {
        **MEASURES,
        **perceptual,
        "fmse": feature_mse(target_features(observation, knowledge)),
    }
    leakage = score(found, truth, knowledge.mean, measures, reasons, knowledge.num_classes)
    return {
        "case": case.name,
        "seed": seed,
        "explanation": found.explanation,
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
        What the results depend on beside the cases; a file with other facts is
        not resumed.
    path : Path or None
        Where the rows are kept; None: nowhere.
    prior : PriorConfig
    lpips_weights : str
        See `load_lpips`.
    """

    name: str
    cases: Sequence[Case]
    info: DatasetInfo
    images: ImageSet
    facts: Mapping[str, Any]
    path: Path | None = None
    prior: PriorConfig = field(default_factory=PriorConfig)
    lpips_weights: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path and self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            facts = {k: v for k, v in kept["facts"].items() if k not in ("workers", "threads")}
            if facts != dict(self.facts):
                raise ValueError(
                    f"{self.path} holds results of {kept['facts']}, not of {dict(self.facts)}; "
                    "choose another --out"
                )
            self.rows = kept["rows"]

    def run(self, draws: int, seed: int, console: Console, workers: int = 1) -> None:
        """Run every case on every draw that has no row yet, draw by draw.

        Parameters
        ----------
        draws : int
            Draws of every case.
        seed : int
            Of the first draw.
        console : Console
            Shows the progress.
        workers : int
            See `in_processes`.
        """
        done = {(row["case"], row["seed"]) for row in self.rows}
        todo = [
            (case, number)
            for number in range(seed, seed + draws)
            for case in self.cases
            if (case.name, number) not in done
        ]
        if not todo:
            return
        setting = _Setting(self.info, self.images, self.prior, self.lpips_weights)
        self.facts = {**self.facts, **shares(workers)}
        for row in in_processes(_measure, setting, todo, workers, self.name, console):
            self.rows.append(row)
            self.save()

    def save(self) -> None:
        """Write facts, machine, summary and rows, whole or not at all."""
        if self.path:
            content = {
                "benchmark": self.name,
                "facts": dict(self.facts),
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
        return entry

    def table(self) -> Table:
        """Return the summary as a table, means with 95% intervals over draws."""
        table = Table(title=f"{self.name}: mean over draws, 95% interval")
        for name in _COLUMNS:
            table.add_column(name, overflow="fold")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def markdown(self, command: str, notes: Sequence[str] = ()) -> str:
        """Return the summary in Markdown, with the command that makes it and notes below."""
        return results_markdown(self.name, command, [_COLUMNS, *self._cells()], self.facts, notes)

    def _cells(self) -> list[list[str]]:
        rows = []
        for case in self.cases:
            line = self.summary(case)
            if not line["draws"]:
                continue
            psnr = line["psnr"]
            beaten = psnr["mean"] > psnr["baseline"]
            half = "" if psnr["low"] is None else f" ± {psnr['high'] - psnr['mean']:.1f}"
            rows.append(
                [
                    case.client,
                    case.name.split(", ", 1)[1],
                    str(line["draws"]),
                    f"{psnr['mean']:.2f}{half}" + ("" if beaten else " (no better than grey)"),
                    "" if case.bar is None else f"{case.bar:g}",
                    f"{psnr['baseline']:.1f}",
                    " ".join(f"{value:.1f}" for value in line["psnr_by_step"]),
                    f"{line['ssim']['mean']:.3f}",
                    f"{line['lpips_vgg']['mean']:.3f}" if line.get("lpips_vgg") else "-",
                    f"{line['loss']:.3f}",
                    f"{line['loss_at_truth']:.3f}",
                    f"{line['seconds']:.0f}",
                    f"{line['iterations_per_second']:.1f}",
                    f"{line['peak_memory'] / 1e6:.0f}",
                ]
            )
        return rows

    def shortfalls(self) -> list[str]:
        """Return, in words, every case whose mean PSNR is below its bar."""
        short = []
        for case in self.cases:
            line = self.summary(case)
            if case.bar is not None and (not line["draws"] or line["psnr"]["mean"] < case.bar):
                reached = f"{line['psnr']['mean']:.2f} dB" if line["draws"] else "nothing"
                short.append(f"{case.name}: {reached}, the bar is {case.bar:g} dB")
        return short


def machine() -> dict[str, Any]:
    """Return what a time depends on: processor, cores, device and versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "flowleak")},
    }


def results_markdown(
    name: str,
    command: str,
    cells: Sequence[Sequence[str]],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Return a benchmark's table in Markdown, between its command and what it depends on.

    Parameters
    ----------
    name, command : str
        The benchmark, and what makes the table.
    cells : sequence of sequence of str
        The table's lines, its head first.
    facts : mapping
        What the results depend on; they win over `machine`'s.
    notes : sequence of str
        Lines below the table.
    """
    head, *rows = cells
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    said = ", ".join(f"{key} {value}" for key, value in {**machine(), **facts}.items())
    below = [*notes, "", said] if notes else [said]
    return "\n".join([f"# {name}", "", f"`{command}`", "", *lines, "", *below, ""])

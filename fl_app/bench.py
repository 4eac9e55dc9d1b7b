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
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from client_app.defenses import defended_weights, distortion, noise_generator, update_bytes
from client_app.training import NO_DEFENSE, choose_batches, in_training_order, normalise, train
from fl_app.audit.metrics import (
    MEASURES,
    feature_mse,
    mean_interval,
    score,
    target_features,
)
from fl_app.audit.perceptual import load_lpips
from fl_app.audit.truth import Truth
from fl_app.bench_processes import in_processes, shares
from fl_app.config import AttackConfig, PriorConfig
from fl_app.data import ImageSet
from fl_app.files import write_text
from fl_app.models import chosen_norm, known_model
from fl_app.protocol import DatasetInfo, Defense, Knowledge, LocalTraining, Observation
from server_strategies.attacks import ATTACKS, run_attack
from server_strategies.attacks.explain import explain
from server_strategies.updates import weighted_mean


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
    gain : float or None
        Mean PSNR in dB by which it has to beat the case that it is compared with
        (`Benchmark.reference`); its LPIPS VGG has to be the lower one, too.
    first : bool
        Whether no other case of its client and its budget may have a higher mean PSNR.
    model, norm : str
        See `create_model`.
    num_examples : int
        Images that the client holds, N; 0: as many as it takes for one pass, K B.
    labels_known : bool
        Whether the attacker is given the labels; otherwise it counts them.
    rounds : int
        Global rounds that the model was trained for before, see `global_model`.
    above_grey : float or None
        Mean PSNR in dB by which it has to beat a grey image.
    defense : Defense
        What the client does so that less is seen; without `secagg`.
    defense_known : bool
        Whether the attacker knows it.
    federations : int
        Seeds of the federation that is trained to see what the defence costs.
    """

    training: LocalTraining
    attack: AttackConfig
    bar: float | None = None
    gain: float | None = None
    first: bool = False
    model: str = "convnet"
    num_examples: int = 0
    labels_known: bool = True
    norm: str = ""
    rounds: int = 0
    above_grey: float | None = None
    defense: Defense = NO_DEFENSE
    defense_known: bool = True
    federations: int = 1

    @property
    def count(self) -> int:
        """Images that the client trains on, N."""
        return self.num_examples or self.training.local_steps * self.training.batch_size

    @property
    def client(self) -> str:
        """The client's side in words, and what of it is not known."""
        t = self.training
        words = [] if self.model == "convnet" and not self.norm else [self.model]
        norm = chosen_norm(self.model, self.norm)
        words += [f"{norm} norm"] * bool(self.norm)
        words += [f"BatchNorm {t.batch_norm}"] * (norm == "batch")
        words += ["statistics kept"] * (norm == "batch" and not t.send_buffers)
        words.append(f"{t.optimizer} {t.lr:g}")
        for name in ("momentum", "weight_decay", "max_grad_norm"):
            words += [f"{name} {getattr(t, name):g}"] * bool(getattr(t, name))
        words += ["nesterov"] * t.nesterov
        words.append(f"K={t.local_steps} B={t.batch_size}")
        if t.passes(self.count) > 1:
            order = "reshuffled" if t.reshuffle else "in order"
            words.append(f"N={self.count} {t.passes(self.count)} passes {order}")
        words += [f"after {self.rounds} rounds"] * bool(self.rounds)
        words += ["labels unknown"] * (not self.labels_known)
        if self.defense != NO_DEFENSE:
            words += [f"{self.defense}", "known" if self.defense_known else "unknown"]
        return " ".join(words)

    @property
    def name(self) -> str:
        """Names the case in the results: everything that decides it but the draw."""
        options = "".join(f" {key}={value}" for key, value in sorted(self.attack.options.items()))
        limit = f" {self.attack.seconds:g} s" if self.attack.seconds else ""
        limit = limit or f" x{self.attack.iterations}"
        return f"{self.client}, {self.attack.name}{options}{limit}"

    @property
    def arena(self) -> tuple[str, int, float]:
        """Client and budget: cases that share them are compared."""
        return self.client, self.attack.iterations, self.attack.seconds


_CLIENTS = 4  # of earlier rounds
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


def draw_client(
    case: Case,
    images: ImageSet,
    info: DatasetInfo,
    seed: int,
    train_images: ImageSet | None = None,
) -> tuple[Observation, Knowledge, Truth]:
    """Train one client from a freshly drawn model on freshly drawn images.

    Parameters
    ----------
    case : Case
    images : ImageSet
        To draw N images from, without replacement.
    info : DatasetInfo
    seed : int
        Decides the images and the model; the same for every case, so that cases
        with as many images are compared on the same ones.
    train_images : ImageSet, optional
        What earlier rounds train on; needed where the case has some.

    Raises
    ------
    ValueError
        If there are fewer than N images.
    """
    generator = torch.Generator().manual_seed(seed)
    agreed = Knowledge(
        case.model,
        info.num_classes,
        info.image_shape,
        info.mean,
        info.std,
        case.training,
        norm=case.norm,
        precode=case.defense.precode,
        dropout=case.defense.dropout,
    )
    earlier = global_model(agreed, case.count, case.rounds, seed, train_images)
    model = known_model(agreed, seed)
    model.load_state_dict(dict(earlier))
    with torch.random.fork_rng():  # a defence may draw noise of its own in every step
        torch.manual_seed(seed)
        private, labels, batches = _train_on_draw(
            model, agreed, case.count, images, generator, case.defense
        )
    known, round_ = tuple(labels.tolist()), case.rounds + 1
    noise = noise_generator(seed, 0, round_)
    weights = defended_weights(earlier, model.state_dict(), case.defense, noise)
    observation = Observation(earlier, weights, case.count, round_, node=seed, client=seed)
    knowledge = replace(agreed, labels=known, defense=case.defense.plain())
    return observation, knowledge, Truth(private, known, batches, round_, node=seed)


@lru_cache(maxsize=8)
def global_model(
    agreed: Knowledge, count: int, rounds: int, seed: int, images: ImageSet | None
) -> Mapping[str, Tensor]:
    """Return a model's weights after rounds of federated averaging over four clients.

    Parameters
    ----------
    agreed : Knowledge
        The model and the training of every client; none defends its update.
    count : int
        Images of a client, drawn anew in every round.
    rounds : int
        0: as it is initialised.
    seed : int
        Decides the initial model and the images.
    images : ImageSet or None
        To draw from; not needed for no rounds.

    Raises
    ------
    ValueError
        If there are fewer than `count` images.
    """
    network = known_model(agreed, seed)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        returned = []
        for _ in range(_CLIENTS):
            network.load_state_dict(weights)
            _train_on_draw(network, agreed, count, images, generator)
            returned.append({name: w.clone() for name, w in network.state_dict().items()})
        weights = weighted_mean(returned, [count] * _CLIENTS)
    return weights


def _train_on_draw(
    model: nn.Module,
    agreed: Knowledge,
    count: int,
    images: ImageSet | None,
    generator: torch.Generator,
    defense: Defense = NO_DEFENSE,
) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
    """Train a model as a client with drawn images; return these, their labels and the batches."""
    if images is None:
        raise ValueError("rounds of training before the attack need training images")
    if count > len(images):
        raise ValueError(f"a client needs {count} images, the split holds {len(images)}")
    picks = torch.randperm(len(images), generator=generator)[:count]
    private, labels = images.images[picks].float() / 255, images.labels[picks]
    _, batches = in_training_order(choose_batches(count, agreed.client, generator))
    steps = [torch.tensor(batch) for batch in batches]
    train(model, private, labels, steps, agreed.client, agreed.mean, agreed.std, defense)
    return private, labels, batches


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


# Once a process: the networks are worth loading once only.
_perceptual = cache(load_lpips)


def _measure(setting: _Setting, case: Case, seed: int) -> dict[str, Any]:
    """Return the row of one draw, measured in a worker process.

    Its ``peak_memory`` (the column MB) is the attack's alone, see `Reconstruction`.
    """
    observation, knowledge, truth = setting.draw(case, seed)
    seen = knowledge if case.labels_known else replace(knowledge, labels=None)
    seen = seen if case.defense_known else replace(seen, defense=NO_DEFENSE)
    found = run_attack(observation, seen, case.attack, setting.prior, seed)
    options = {**ATTACKS[case.attack.name].options, **case.attack.options}
    distance = options.get("distance", "cosine")
    explanation = explain(options["explain"], observation, knowledge, distance=distance)
    private = normalise(truth.images, knowledge.mean, knowledge.std)
    at_truth = explanation(private, 1.0).item()
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
            if case.above_grey is not None and above < case.above_grey:
                reached = f"{above:+.2f} dB above grey"
                short.append(f"{case.name}: {reached}, the bar is {case.above_grey:+g} dB")
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


def kept_rows(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a results file, each with the commit that made it.

    Parameters
    ----------
    path : Path
    facts : mapping
        What the results that are wanted depend on. How the work was shared out, and the
        commit, may be others: what is measured in parts, over several versions, says so.

    Raises
    ------
    ValueError
        If the file's facts are others.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = (
        {k: v for k, v in of.items() if k not in ("workers", "threads", "commit")}
        for of in (kept["facts"], facts)
    )
    if theirs != ours:
        raise ValueError(f"{path} holds results of {theirs}, not of {ours}; choose another --out")
    return [with_commit(row, kept["facts"]) for row in kept["rows"]]


def with_commit(row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the commit that made it: its own, or that of the facts."""
    return {"commit": facts.get("commit", "unknown"), **row}


def commits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the commits that rows are of, in words."""
    made = [row.get("commit", "unknown") for row in rows]
    return ", ".join(
        f"{commit} ({made.count(commit)} of {len(made)} rows)" if len(set(made)) > 1 else commit
        for commit in dict.fromkeys(made)
    )


def half_width(interval: Mapping[str, float | None], digits: int) -> str:
    """Return half the width of an interval in words; nothing for a single draw."""
    low, high = interval["low"], interval["high"]
    return "" if low is None or high is None else f" ± {(high - low) / 2:.{digits}f}"


def signed(gain: Mapping[str, float | None] | None, digits: int) -> str:
    """Return a paired difference in words; nothing where there is none."""
    return f"{gain['mean']:+.{digits}f}{half_width(gain, digits)}" if gain else ""


def _bar(case: Case) -> str:
    words = [] if case.bar is None else [f"{case.bar:g}"]
    words += [] if case.above_grey is None else [f"grey {case.above_grey:+g}"]
    words += [] if case.gain is None else [f"{case.gain:+g} dB, LPIPS lower"]
    words += ["first"] * case.first
    return "; ".join(words)


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
    lines = markdown_table(cells)
    return sections_markdown(name, command, [*lines, "", *notes] if notes else lines, facts)


def sections_markdown(
    name: str, command: str, lines: Sequence[str], facts: Mapping[str, Any]
) -> str:
    """Return lines of Markdown between the command that makes them and what they depend on.

    Parameters are those of `results_markdown`, with `lines` for its table and notes.
    """
    said = ", ".join(f"{key} {value}" for key, value in {**machine(), **facts}.items())
    return "\n".join([f"# {name}", "", f"`{command}`", "", *lines, "", said, ""])


def markdown_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines in Markdown; the first of `cells` is its head."""
    head, *rows = cells
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]

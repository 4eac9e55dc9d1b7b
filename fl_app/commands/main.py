"""The command `flowleak`: look at runs, attack them again, train priors, run benchmarks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_app.audit.advice import defense_advice
from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import read_lines
from fl_app.audit.report import leakage_table
from fl_app.audit.rounds import read_rounds, rounds_cells, save_plot
from fl_app.benchmarks.alignment import ALIGNMENT
from fl_app.benchmarks.assumptions import assumption_tables
from fl_app.benchmarks.benchmark import Benchmark
from fl_app.benchmarks.cases import BENCHMARKS
from fl_app.benchmarks.costs import prior_cost, surrogate_speedup
from fl_app.benchmarks.defenses import (
    compare_with_sme,
    defense_cells,
    measure_accuracies,
    save_defense_plot,
)
from fl_app.benchmarks.denoising import denoising_table, evaluate_denoising, write_card
from fl_app.benchmarks.labels import LABELS
from fl_app.benchmarks.processes import shares
from fl_app.benchmarks.table import machine
from fl_app.config import (
    AttackConfig,
    ConfigError,
    DatasetConfig,
    PriorConfig,
    from_yaml,
    load_config,
)
from fl_app.data import dataset_info, draw_images, load_split
from fl_app.data.hub import LAYOUTS
from fl_app.lan.commands import lan_app
from fl_app.runs.attacking import finish_attacks, only_one, score_later, watch_input
from fl_app.runs.comparison import AttackComparison
from fl_app.runs.folder import find_run, git_commit, list_runs
from fl_app.util.files import user_path, write_text
from fl_app.util.machine import host
from fl_app.util.markdown import markdown_table, sections_markdown
from server_strategies.attack_pool import Job, enqueue
from server_strategies.attacks.run import create_attack
from server_strategies.observations import ObservationStore
from server_strategies.priors.flow import find_weights
from server_strategies.priors.images import load_images
from server_strategies.priors.networks import NETWORKS
from server_strategies.priors.training import Trainer, TrainingSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    pretty_exceptions_show_locals=False,  # keys are among them
)
prior_app = typer.Typer(no_args_is_help=True, help="Flow-matching priors.")
app.add_typer(prior_app, name="prior")
app.add_typer(lan_app, name="lan")
console = Console()

_TRAIN_IMAGES = 2000  # that earlier rounds of a benchmark draw from
_WITHOUT_ATTACKS = {each.name: each for each in (LABELS, ALIGNMENT)}
_BENCHMARKS = (*BENCHMARKS, *_WITHOUT_ATTACKS)

RunsDir = Annotated[Path, typer.Option(help="Where the runs are; as the setting runs_dir.")]
DatasetChoice = Annotated[
    str, typer.Option(help="A data set's name, or a folder: parquet files or class folders.")
]
Weights = Annotated[str, typer.Argument(help="A shipped prior's name, or a .safetensors file.")]


def main() -> None:
    """Run the command; what a user can mend is one line, not a traceback."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(Text(f"flowleak: {error}", style="red"))
        raise SystemExit(2) from error


@app.command()
def runs(runs_dir: RunsDir = Path("runs")) -> None:
    """List the runs: when, what, how many attacks, the most that leaked."""
    folder = user_path(str(runs_dir))
    table = Table("run", "started", "data", "client", "attack", "lines", "best PSNR dB", "grey")
    for run in list_runs(folder):
        config = from_yaml(run / "config.yaml")
        lines = read_lines(run / "leakage.jsonl")[0]
        scores = [line["metrics"]["psnr"] for line in lines if line["metrics"].get("psnr")]
        best = max(scores, key=lambda score: score["mean"] or 0, default=None)
        started = OmegaConf.select(OmegaConf.load(run / "config.yaml"), "started")
        table.add_row(
            run.name,
            str(started)[:16],
            config.dataset.name,
            f"{config.client.optimizer} {config.client.lr:g}",
            config.attack.name,
            str(len(lines)),
            f"{best['mean']:.1f}" if best else "-",
            f"{best['baseline']:.1f}" if best else "-",
        )
    console.print(table if table.row_count else f"No runs in {folder}")


@app.command()
def show(run: str, runs_dir: RunsDir = Path("runs")) -> None:
    """Show a run's leakage table, and where its pictures are."""
    folder = find_run(user_path(str(runs_dir)), run)
    lines, torn = read_lines(folder / "leakage.jsonl")
    console.print(leakage_table(lines))
    advice = defense_advice(folder)
    if advice:
        console.print(advice, soft_wrap=True, highlight=False, markup=False)
    if torn:
        console.print(f"{torn} torn lines were left out", style="yellow")
    for line in lines:
        if line["picture"]:
            console.print(folder / line["picture"], soft_wrap=True, highlight=False)


@app.command()
def rounds(run: str, runs_dir: RunsDir = Path("runs")) -> None:
    """Show accuracy and leakage by round, and save them as rounds.md and rounds.png."""
    folder = find_run(user_path(str(runs_dir)), run)
    lines = read_rounds(folder)
    if not lines:
        raise ConfigError(f"{folder} has no finished round and no attack yet")
    cells = rounds_cells(lines)
    table = Table(*cells[0])
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    console.print(table)
    notes = [
        "",
        "Accuracy: of the global model after the round, on the test images of the clients that "
        "evaluated it. The updates of round r start from the model after round r - 1.",
    ]
    written = folder / "rounds.md"
    text = [*markdown_table(cells), *notes]
    write_text(written, sections_markdown(run, f"flowleak rounds {run}", text, host()))
    save_plot(written.with_suffix(".png"), lines, run)
    for path in (written, written.with_suffix(".png")):
        console.print(path, soft_wrap=True, highlight=False)


@app.command()
def attack(
    run: str,
    attack: Annotated[
        str,
        typer.Option(
            help="Attack to run, several with commas between, or all; "
            "default: finish what the run left unfinished."
        ),
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            help="What each attack of a comparison may spend: authors (default), iterations=N "
            "or seconds=S."
        ),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Settings of the attack, e.g. iterations=500 options.lr=0.4"),
    ] = None,
    follow: Annotated[
        bool, typer.Option(help="Take jobs that join the queue, until standard input ends.")
    ] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Attack a run's recorded Observations again; the lines join its log.

    Several attacks, or one with a budget, make a comparison: what has its line already
    is not run again, and comparison.md, .json and .png in the run's folder compare them.
    """
    folder = find_run(user_path(str(runs_dir)), run)
    if budget or attack == "all" or "," in attack:
        if set_ or follow:
            raise ConfigError("--set and --follow are allowed with one attack, without --budget")
        AttackComparison.of(attack or "all", budget or "authors").run(folder, console)
        return
    config = from_yaml(folder / "config.yaml")
    store = ObservationStore(folder)
    auditor = Auditor(folder, config, config.knowledge(dataset_info(config.dataset)))
    before = len(auditor.lines())
    if attack:
        chosen = _attack_config(attack, set_ or [])
        with only_one(folder):
            for id_ in store.ids():
                job = Job(store.load(id_), auditor.knowledge, chosen, config.prior, config.seed)
                enqueue(folder, job)
    finish_attacks(auditor, console, watch_input() if follow else lambda: True)
    lines = auditor.lines()[before:]
    if follow:  # the training shows the table
        return
    if lines:
        console.print(leakage_table(lines))
    else:
        console.print("Nothing to do: no observation, or every attack of the run has its line")


@app.command()
def score(
    run: str,
    truth: Annotated[
        Path, typer.Option(help="Folder whose truth/ holds the clients' private batches.")
    ],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Score a run's reconstructions with a Truth brought later; the lines join its log."""
    folder = find_run(user_path(str(runs_dir)), run)
    lines = score_later(folder, truth)
    if not lines:
        console.print(f"Nothing to do: {truth / 'truth'} holds none of the unscored clients")
        return
    console.print(leakage_table(lines))


def _attack_config(name: str, settings: list[str]) -> AttackConfig:
    pairs = [pair for setting in settings for pair in setting.split()]
    overrides = " ".join(f"attack.{pair}" for pair in pairs)
    chosen = load_config({"attack": name, "overrides": overrides}).attack
    create_attack(chosen)
    return chosen


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(_BENCHMARKS)}")],
    dataset: DatasetChoice = "cifar10",
    split: str = "test",
    draws: Annotated[
        int, typer.Option(help="Of each case; 0: only the table of the rows that --out holds.")
    ] = 8,
    seed: int = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of all rows (a .md table beside it); an existing one is gone on with."
        ),
    ] = None,
    lpips_weights: Annotated[
        str, typer.Option(help="Folder of LPIPS trunk weights; 'download': torchvision's.")
    ] = "",
    workers: Annotated[
        int, typer.Option(help="Processes that share the cores; times in the table are theirs.")
    ] = 1,
    cases: Annotated[
        str, typer.Option(help="Run only cases in whose name this regular expression is found.")
    ] = "",
    prior: Annotated[
        str, typer.Option(help="Of the attacks: a shipped prior's name, or a .safetensors file.")
    ] = PriorConfig.weights,
    bars: Annotated[bool, typer.Option(help="Fail where a figure falls short of its bar.")] = False,
) -> None:
    """Measure attacks on freshly drawn clients, print the table, keep every row."""
    if name not in _BENCHMARKS:
        raise ConfigError(f"benchmark is {name!r}; allowed: {', '.join(_BENCHMARKS)}")
    kept = bool(out and out.exists() and name in BENCHMARKS)
    if draws < (0 if kept else 1):
        raise ConfigError(f"draws is {draws}; allowed: 1 or more, or 0 where --out holds attacks")
    if workers < 1:
        raise ConfigError(f"workers is {workers}; allowed: 1 or more")
    if lpips_weights not in ("", "download"):
        lpips_weights = _typed(lpips_weights)
    if cases and name not in BENCHMARKS:
        raise ConfigError(f"cases is {cases!r}; {name} has none to choose from")
    if prior != PriorConfig.weights and name not in BENCHMARKS:
        raise ConfigError(f"prior is {prior!r}; {name} attacks with none")
    stem = find_weights(_weights(prior)).stem
    data = _dataset_config(dataset)
    info, images = dataset_info(data), load_split(data, split)
    facts = {"dataset": data.name, "split": split, "first_seed": seed, "commit": git_commit()}
    command = f"flowleak bench {name} --dataset {data.name} --split {split}"
    if prior != PriorConfig.weights:
        facts["prior"] = stem
        command += f" --prior {stem}"
    shared = f" --seed {seed}" + (f" --workers {workers}" if workers > 1 else "")
    run = BENCHMARKS.get(name) or _WITHOUT_ATTACKS[name].clients
    train_images = None
    if any(case.rounds for case in run):
        train_images = draw_images(data, "train", _TRAIN_IMAGES, seed)
    if name in _WITHOUT_ATTACKS:
        reading = _WITHOUT_ATTACKS[name]
        command += f" --draws {draws}{shared}"
        rows = reading.run(images, train_images, info, draws, seed, console, workers)
        console.print(reading.table(rows))
        if out:
            reading.save(out, rows, command, {**facts, **shares(workers)})
        short = reading.shortfalls(rows)
    else:
        benchmark = Benchmark(
            name, BENCHMARKS[name], info, images, facts, path=out,
            prior=PriorConfig(_weights(prior)), lpips_weights=lpips_weights,
            train_images=train_images,
        )  # fmt: skip
        command += f" --draws {draws or benchmark.draws}{shared}"
        command += f" --cases {shlex.quote(cases)}" if cases else ""
        benchmark.run(draws, seed, console, workers, cases)
        # Into a file rich would print for a screen of 80 columns.
        width = None if console.is_terminal else max(console.width, 140)
        console.print(benchmark.table(), width=width)
        notes = []
        if name == "matching":
            for size in (1, 4):
                factor = surrogate_speedup(info, images, size)
                notes.append(
                    f"Our surrogate makes {factor:.2f} iterations in the time of one of a "
                    f"plain loop over the parameters (B={size}; 2 were asked for)."
                )
        if name == "prior":
            for client in dict.fromkeys(case.training for case in benchmark.cases):
                share = prior_cost(info, images, client, benchmark.prior)
                notes.append(
                    f"A step of the flow prior takes {share:.2f} of the time of a matching step "
                    f"({client.optimizer}, B={client.batch_size}; at most 0.5 was asked for)."
                )
        if name == "defenses":
            data_sets = (load_split(data, "train"), images, info)
            federations = out.with_suffix(".accuracy.json") if out else None
            reached = measure_accuracies(
                benchmark.chosen(cases), data_sets, {**facts, "images": len(data_sets[0])}, seed,
                console, workers, federations, train=draws > 0,
            )  # fmt: skip
            notes += markdown_table(defense_cells(benchmark, reached))
            notes += ["", *compare_with_sme(benchmark)]
            if out:
                save_defense_plot(out.with_suffix(".png"), benchmark, reached)
        if notes:
            console.print("\n".join(notes))
        if out:
            write_text(out.with_suffix(".md"), benchmark.markdown(command, notes))
        short = benchmark.shortfalls()
    if out:
        console.print(f"Rows: {out}, table: {out.with_suffix('.md')}", soft_wrap=True)
    for words in short:
        console.print(f"Short of its bar: {words}", style="yellow")
    if bars and short:
        raise typer.Exit(1)


def _typed(path: str) -> str:
    """Return a path that was typed, as an absolute one: from the working folder."""
    return str(Path(path).expanduser().absolute())


def _weights(weights: str) -> str:
    """Return a prior's name as it is, and the path of a file as `_typed` does."""
    return _typed(weights) if weights.endswith(".safetensors") else weights


def _dataset_config(choice: str) -> DatasetConfig:
    """Return the data set that a name or a folder means."""
    if re.fullmatch(r"\w+", choice) and not Path(choice).is_dir():
        return load_config({"dataset": choice}).dataset
    if not Path(choice).is_dir():
        raise ConfigError(f"dataset is {choice!r}: no known name, and no such folder")
    name = "imagefolder"
    if any(Path(choice).rglob("*.parquet")):
        name = _named_after(Path(choice).resolve().name)
    source = shlex.quote(f"dataset.source={_typed(choice)}")
    return load_config({"dataset": name, "overrides": source}).dataset


def _named_after(folder: str) -> str:
    """Return the public data set whose name a folder's holds; CIFAR-10 where there is none."""
    plain = re.sub(r"[\W_]", "", folder.lower())
    longest_first = sorted(LAYOUTS, key=len, reverse=True)  # cifar100 holds cifar10
    return next((name for name in longest_first if name.replace("_", "") in plain), "cifar10")


@prior_app.command("train")
def train_prior(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images or of parquet files, a data set on the hub, or a .npy file."
        ),
    ],
    layout: Annotated[
        str, typer.Option(help="images: a file is an image; mosaic: a grid of 32x32 tiles.")
    ] = "images",
    network: Annotated[
        str, typer.Option(help=f"One of: {', '.join(NETWORKS)}.")
    ] = TrainingSettings.network,
    images: Annotated[int, typer.Option(help="Images to see.")] = TrainingSettings.images,
    minutes: Annotated[float, typer.Option(help="Time limit over all resumptions; 0: none.")] = 0,
    batch_size: int = TrainingSettings.batch_size,
    learning_rate: float = TrainingSettings.learning_rate,
    focus: Annotated[
        float, typer.Option(help="Share of flow times in [0.6, 1]; 0.4: uniform.")
    ] = TrainingSettings.focus,
    seed: int = TrainingSettings.seed,
    start: Annotated[
        str,
        typer.Option(help="Weights to begin with: a shipped prior's name, or a .safetensors file."),
    ] = TrainingSettings.start,
    folder: Annotated[
        Path, typer.Option(help="Checkpoint and progress; one found there is resumed.")
    ] = Path("checkpoints/prior"),
    describe: Annotated[str, typer.Option(help="What the images are, for the card.")] = "",
    out: Annotated[
        Path, typer.Option(help="The weights (.safetensors); their card lies beside them.")
    ] = Path("checkpoints/prior/prior.safetensors"),
) -> None:
    """Train a flow prior; a killed training resumes with the same command."""
    settings = TrainingSettings(
        network=network,
        images=images,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        focus=focus,
        seed=seed,
        start=_weights(start),
    )
    loaded, broken = load_images(source, layout)
    skipped = f", {broken} broken ones skipped" if broken else ""
    console.print(f"{len(loaded):,} images{skipped}")
    trainer = Trainer(loaded, settings, folder, describe or Path(source).name)
    trainer.run(console)
    trainer.export(out, git_commit() or "unknown")
    console.print(f"Weights: {out}", highlight=False, soft_wrap=True)


@prior_app.command("evaluate")
def evaluate_prior(
    weights: Weights,
    dataset: DatasetChoice = "cifar10",
    images: Annotated[int, typer.Option(help="Test images to denoise.")] = 64,
) -> None:
    """Measure how well a flow prior denoises, and write it into its model card."""
    weights = _weights(weights)
    card = find_weights(weights).with_suffix(".md")
    data = _dataset_config(dataset)
    test = load_split(data, "test").images
    rows = evaluate_denoising(weights, test, images)
    console.print(denoising_table(rows))
    command = f"flowleak prior evaluate {card.stem} --dataset {data.name} --images {images}"
    what = f"{images} of {len(test):,} {data.name} test images"
    write_card(card, rows, what, command, git_commit() or "unknown")
    console.print(f"Card: {card}", highlight=False, soft_wrap=True)


@prior_app.command("assumptions")
def check_assumptions(
    weights: Weights,
    dataset: DatasetChoice = "cifar10",
    images: Annotated[int, typer.Option(help="Test images to corrupt.")] = 64,
    iterations: Annotated[int, typer.Option(help="Of the attack that gives the iterates.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Markdown file of the tables.")] = None,
) -> None:
    """Measure the paper's assumptions A1 and A2 on a flow prior."""
    weights = _weights(weights)
    data = _dataset_config(dataset)
    test = load_split(data, "test")
    facts = {"dataset": data.name, "split": "test", "commit": git_commit()}
    lines = assumption_tables(weights, test, dataset_info(data), images, iterations)
    name = weights if not weights.endswith(".safetensors") else Path(weights).name
    command = f"flowleak prior assumptions {name} --dataset {data.name} --images {images}"
    command += f" --iterations {iterations}"
    text = sections_markdown("assumptions", command, lines, {**machine(), **facts})
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if out:
        write_text(out, text)


if __name__ == "__main__":
    main()

"""The command `flowleak`: look at runs, attack them again, train priors, run benchmarks."""

from __future__ import annotations

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
from fl_app.benchmarks.assumptions import assumption_tables
from fl_app.benchmarks.denoising import denoising_table, evaluate_denoising, write_card
from fl_app.benchmarks.rows import machine
from fl_app.commands.arguments import DatasetChoice, Weights, dataset_config, prior_weights
from fl_app.commands.bench import bench
from fl_app.config import (
    AttackConfig,
    ConfigError,
    from_yaml,
    load_config,
)
from fl_app.data import dataset_info, load_split
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
app.command()(bench)
console = Console()

RunsDir = Annotated[Path, typer.Option(help="Where the runs are; as the setting runs_dir.")]


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
        start=prior_weights(start),
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
    weights = prior_weights(weights)
    card = find_weights(weights).with_suffix(".md")
    data = dataset_config(dataset)
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
    weights = prior_weights(weights)
    data = dataset_config(dataset)
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

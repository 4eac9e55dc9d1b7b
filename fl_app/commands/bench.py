"""`flowleak bench`: attacks measured on freshly drawn clients."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fl_app.commands.arguments import dataset_config, prior_weights, typed_path
from fl_app.commands.options import DatasetChoice
from fl_app.commands.output import screen
from fl_app.config import ConfigError, PriorConfig

_TRAIN_IMAGES = 2000  # that earlier rounds of a benchmark draw from


def bench(
    name: Annotated[str, typer.Argument(help="A name that flowleak list benchmarks prints.")],
    dataset: DatasetChoice = "cifar10",
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    draws: Annotated[
        int, typer.Option(help="Of each case; 0: only the table of the rows that --out holds.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the first trial.")] = 0,
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
    from fl_app.benchmarks.alignment import ALIGNMENT
    from fl_app.benchmarks.benchmark import Benchmark
    from fl_app.benchmarks.cases import BENCHMARKS
    from fl_app.benchmarks.costs import prior_cost, surrogate_speedup
    from fl_app.benchmarks.defenses import (
        compare_with_sme,
        defense_cells,
        measure_accuracies,
        save_defense_plot,
    )
    from fl_app.benchmarks.labels import LABELS
    from fl_app.benchmarks.processes import shares
    from fl_app.data import dataset_info, draw_images, load_split
    from fl_app.runs.folder import git_commit
    from fl_app.util.files import write_text
    from fl_app.util.markdown import markdown_table
    from server_strategies.priors.flow import find_weights

    console = screen()
    without_attacks: dict[str, Any] = {each.name: each for each in (LABELS, ALIGNMENT)}
    names = (*BENCHMARKS, *without_attacks)
    if name not in names:
        raise ConfigError(f"benchmark is {name!r}; allowed: {', '.join(names)}")
    kept = bool(out and out.exists() and name in BENCHMARKS)
    if draws < (0 if kept else 1):
        raise ConfigError(f"draws is {draws}; allowed: 1 or more, or 0 where --out holds attacks")
    if workers < 1:
        raise ConfigError(f"workers is {workers}; allowed: 1 or more")
    if lpips_weights not in ("", "download"):
        lpips_weights = typed_path(lpips_weights)
    if cases and name not in BENCHMARKS:
        raise ConfigError(f"cases is {cases!r}; {name} has none to choose from")
    if prior != PriorConfig.weights and name not in BENCHMARKS:
        raise ConfigError(f"prior is {prior!r}; {name} attacks with none")
    stem = find_weights(prior_weights(prior)).stem
    data = dataset_config(dataset)
    info, images = dataset_info(data), load_split(data, split)
    facts = {"dataset": data.name, "split": split, "first_seed": seed, "commit": git_commit()}
    command = f"flowleak bench {name} --dataset {data.name} --split {split}"
    if prior != PriorConfig.weights:
        facts["prior"] = stem
        command += f" --prior {stem}"
    shared = f" --seed {seed}" + (f" --workers {workers}" if workers > 1 else "")
    run = BENCHMARKS.get(name) or without_attacks[name].clients
    train_images = None
    if any(case.rounds for case in run):
        train_images = draw_images(data, "train", _TRAIN_IMAGES, seed)
    if name in without_attacks:
        reading = without_attacks[name]
        command += f" --draws {draws}{shared}"
        rows = reading.run(images, train_images, info, draws, seed, console, workers)
        console.print(reading.table(rows))
        if out:
            reading.save(out, rows, command, {**facts, **shares(workers)})
        short = reading.shortfalls(rows)
    else:
        benchmark = Benchmark(
            name, BENCHMARKS[name], info, images, facts, path=out,
            prior=PriorConfig(prior_weights(prior)), lpips_weights=lpips_weights,
            train_images=train_images,
        )  # fmt: skip
        command += f" --draws {draws or benchmark.draws}{shared}"
        command += f" --cases {shlex.quote(cases)}" if cases else ""
        benchmark.run(draws, seed, console, workers, cases)
        console.print(benchmark.table())
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

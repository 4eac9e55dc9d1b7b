"""`flowleak bench`: benchmarks, and what made their tables. Imports come when a command runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fl_app.commands.arguments import (
    DatasetChoice,
    dataset_config,
    lpips_folder,
    prior_weights,
    whole_numbers,
)
from fl_app.commands.group import DefaultGroup, group
from fl_app.registry import BENCHMARKS

if TYPE_CHECKING:
    from fl_app.benchmarks.suite import Setting, Suite
    from fl_app.config import DatasetConfig

bench_app = group("Benchmarks: `flowleak bench NAME` runs one, for short.", DefaultGroup)


@bench_app.command("run")
def run_benchmark(
    name: Annotated[
        str,
        typer.Argument(
            help=f"One of: {', '.join(sorted(BENCHMARKS))}. `flowleak list benchmarks` says what "
            "they show.",
            autocompletion=lambda: sorted(BENCHMARKS),
        ),
    ],
    dataset: DatasetChoice = "cifar10",
    split: Annotated[
        str,
        typer.Option(
            help="Images that clients draw from: train, or one half of the test split: test, to "
            "report, or tuning, to choose constants on; empty: the benchmark's own, test or tuning."
        ),
    ] = "",
    trials: Annotated[
        int,
        typer.Option(
            help="Fresh clients for each case, 1 or more; 0: only the table of the results "
            "that --out holds."
        ),
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the first trial, 0 or more.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of all rows, NAME.json or, compressed, NAME.json.xz, with the table "
            "beside it (.md); one that exists is continued."
        ),
    ] = None,
    lpips_weights: Annotated[
        str,
        typer.Option(
            help="Folder of LPIPS trunk weights; download: torchvision's; empty: what the cache "
            "of torch.hub holds."
        ),
    ] = "",
    workers: Annotated[
        int,
        typer.Option(help="Processes that share the cores, 1 or more; times are theirs."),
    ] = 1,
    cases: Annotated[
        str, typer.Option(help="Run only cases in whose name this regular expression is found.")
    ] = "",
    prior: Annotated[
        str,
        typer.Option(
            help="Of the attacks: a prior's name (`flowleak list priors`), a .safetensors file, "
            "or hub:OWNER/NAME; empty: the default one."
        ),
    ] = "",
    private: Annotated[
        str,
        typer.Option(
            help="Folder of the images that are attacked, in the data set's classes and size, "
            "where they are to be others than its own."
        ),
    ] = "",
    updates: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write each client's update to; images that another tool leaves "
            "beside one, as TOOL@SECONDS.npz, are scored in the same table."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 where a figure misses its threshold.")
    ] = False,
) -> None:
    """Measure attacks on freshly drawn clients, print the table, keep every row."""
    from fl_app.benchmarks.suite import Setting
    from fl_app.config import ConfigError, PriorConfig

    if name not in BENCHMARKS:
        raise ConfigError(BENCHMARKS.unknown(name))
    suite = BENCHMARKS[name]
    setting = Setting(
        dataset_config(dataset),
        split or suite.split,
        trials,
        seed,
        out,
        workers,
        cases,
        PriorConfig(prior_weights(prior)) if prior else PriorConfig(),
        lpips_folder(lpips_weights),
        dataset_config(private) if private else None,
        updates,
    )
    entry = BENCHMARKS.entries.get(name)
    shows = entry.docstring().partition("\n")[0] if entry else ""
    _run(suite, name, setting, lambda trials: setting.command(name, trials), check, shows)


def _run(
    suite: Suite[Any],
    name: str,
    setting: Setting,
    command: Callable[[int], str],
    check: bool = False,
    shows: str = "",
) -> None:
    """Run a benchmark, print its table, and keep it beside the rows.

    `command` takes the number of trials, and returns what makes the results. `shows` is a sentence
    for the table's file.
    """
    from fl_app.benchmarks.rows import file_beside
    from fl_app.commands.output import screen
    from fl_app.util.files import write_text

    console = screen()
    results = suite.run(name, setting, console)
    console.print(results.table())
    results.note(suite.notes(results, setting, console))
    for line in results.notes:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if setting.path:
        table = file_beside(setting.path, ".md")
        made_by = command(setting.trials or results.trials)
        write_text(table, results.markdown(made_by, shows))
        console.print(f"Rows: {setting.path}, table: {table}", soft_wrap=True)
    missed = results.shortfalls()
    for words in missed:
        console.print(f"Misses its threshold: {words}", style="yellow")
    if check and missed:
        raise typer.Exit(1)


@bench_app.command("paper")
def make_again(
    table: Annotated[int, typer.Option(help="Of the paper, 1 to 4.")] = 0,
    figure: Annotated[int, typer.Option(help="Of the paper, 2 to 5.")] = 0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose the weights of eq. 18, on tuning images.")
    ] = False,
    budget: Annotated[
        str, typer.Option(help="smoke: minutes; cpu: a night on two cores; gpu: 15 minutes.")
    ] = "cpu",
    dataset: DatasetChoice = "cifar10",
    trials: Annotated[int, typer.Option(help="Fresh clients for each case, 1 or more.")] = 4,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file of all rows, with the table (.md) and the figure (.png)."),
    ] = None,
    lpips_weights: Annotated[str, typer.Option(help="As for bench run.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that share the cores.")] = 1,
    cases: Annotated[str, typer.Option(help="As for bench run.")] = "",
    prior: Annotated[
        str, typer.Option(help="As for bench run; the paper's own attack keeps its network.")
    ] = "",
) -> None:
    """Make a table or a figure of the paper again, ours beside what it prints."""
    from fl_app.benchmarks.paper.elements import BUDGETS
    from fl_app.benchmarks.paper.suite import paper_suite
    from fl_app.benchmarks.suite import Setting
    from fl_app.config import ConfigError, PriorConfig

    if sum((bool(table), bool(figure), tune)) != 1:
        raise ConfigError("one of --table, --figure and --tune is needed")
    if budget not in BUDGETS:
        raise ConfigError(f"budget is {budget!r}; allowed: {', '.join(BUDGETS)}")
    data = dataset_config(dataset)
    if figure == 2:
        _velocities(data, budget, out)
        return
    element = "" if tune else f"table {table}" if table else f"figure {figure}"
    suite = paper_suite(element, budget)
    lpips = lpips_folder(lpips_weights)
    chosen = PriorConfig(prior_weights(prior)) if prior else PriorConfig()
    setting = Setting(data, suite.split, trials, 0, out, workers, cases, chosen, lpips)
    words = "--tune" if tune else f"--{element}"

    def command(trials: int) -> str:
        made = f"flowleak bench paper {words} --budget {budget} --dataset {data.name}"
        made += f" --prior {setting.prior_name}" if setting.prior_name else ""
        return f"{made} --trials {trials}" + (f" --cases {shlex.quote(cases)}" if cases else "")

    _run(suite, f"paper, {element or 'tuning'}", setting, command)


def _velocities(data: DatasetConfig, budget: str, out: Path | None) -> None:
    from fl_app.benchmarks.paper.figures import velocities
    from fl_app.benchmarks.rows import file_beside
    from fl_app.commands.output import screen, table_of
    from fl_app.config import ConfigError
    from fl_app.data import load_split

    if not out:
        raise ConfigError("--figure 2 needs --out NAME.json, beside which NAME.png is drawn")
    images = load_split(data, "test")
    count = 8 if budget == "smoke" else 64
    weights = "compact" if budget == "smoke" else "unet64"
    screen().print(table_of(velocities(file_beside(out, ".png"), weights, images, count)))


@bench_app.command("device")
def tell_device(
    dataset: DatasetChoice = "cifar10",
    batches: Annotated[str, typer.Option(help="Images a step, such as 1,4,16.")] = "1,4,16",
    seconds: Annotated[float, typer.Option(help="For each client, 0.1 or more.")] = 30.0,
) -> None:
    """Measure what this machine's GPU or CPU does with a search along the trajectory."""
    from fl_app.benchmarks import device
    from fl_app.commands.output import screen
    from fl_app.config import at_least

    sizes = whole_numbers("batches", batches)
    at_least("seconds", seconds, 0.1)
    speeds = device.device_speeds(dataset_config(dataset), sizes, seconds)
    screen().print(device.table(speeds))


@bench_app.command("status")
def tell_status(
    folder: Annotated[Path, typer.Argument(help="Folder of the tables (.md).")] = Path(
        "docs/results"
    ),
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="Print Markdown instead, without the age: the same until a table changes.",
        ),
    ] = False,
) -> None:
    """Tell what made each table of a folder, and whether by the code that runs."""
    from fl_app.benchmarks.status import kept_tables, status_cells
    from fl_app.commands.output import screen, table_of
    from fl_app.util.markdown import markdown_table

    cells = status_cells(kept_tables(folder), lasting=markdown)
    if markdown:
        typer.echo("\n".join(markdown_table(cells)))
    else:
        screen().print(table_of(cells))

"""`flowleak runs`, `show` and `rounds`: what runs have left. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fl_app.commands.arguments import RunName, RunsDir
from fl_app.commands.output import print_json, screen, table_of, warn
from fl_app.util.text import printable

if TYPE_CHECKING:
    from rich.table import Table

    from fl_app.audit.rounds import RoundLine

# What differs from run to run of what `assumptions` says.
_GIVEN = ("Sees", "Labels", "Model", "Local training", "Defence")
_ROUNDS_NOTE = (
    "Accuracy: of the global model after the round, on the test images of the clients that "
    "evaluated it. The updates of round r start from the model after round r - 1. Scores: mean "
    "over updates, with its 95% interval from 5 on and their values below; median and worst tenth "
    "(the tenth that leaks most) over their images."
)

RunsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print a JSON list instead. Keys: run, path, started, dataset, optimizer, lr, "
        "attack, lines, best_psnr, mean_colour_psnr (dB; null: nothing was scored), problems "
        "(what could not be read), and disk_bytes with --disk. dataset is null where the data is "
        "the user's own.",
    ),
]
LinesJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the lines of leakage.jsonl as a JSON list instead. Keys: round, node, "
        "client, attack, status, metrics and all others of fl_app.audit.leakage_log.LogLine; "
        "null: the line has none.",
    ),
]
RoundsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print a JSON list instead, and save nothing. Keys: round, accuracy, attack, "
        "succeeded, updates, scores (by metric: mean, low, high, values, median, worst_tenth, "
        "mean_colour), single_colour, identified (count, of, candidates, chance).",
    ),
]


def runs(
    runs_dir: RunsDir = Path("runs"),
    disk: Annotated[
        bool, typer.Option("--disk", help="Say what each takes on the disk, too.")
    ] = False,
    json_: RunsJson = False,
) -> None:
    """List the runs: when, what, how many attacks, the most that leaked."""
    from fl_app.runs.folder import list_runs
    from fl_app.util.files import runs_folder

    folder = runs_folder(str(runs_dir))
    found = [_summary(run) | (_disk(run) if disk else {}) for run in list_runs(folder)]
    if json_:
        print_json(found)
        return
    warn(f"{run['run']}: {problem}" for run in found for problem in run["problems"])
    head = ["run", "started", "data", "client", "attack", "lines", "best PSNR dB", "mean colour dB"]
    head += ["on disk"] * disk
    console = screen()
    console.print(table_of([head, *map(_run_cells, found)]) if found else f"No runs in {folder}")


def _disk(run: Path) -> dict[str, int]:
    from fl_app.runs.deleting import disk_bytes

    return {"disk_bytes": disk_bytes(run)}


def _summary(run: Path) -> dict[str, Any]:
    """Return what `runs` says of a run; of its configuration only that much is read."""
    from fl_app.audit.leakage_log import read_lines
    from fl_app.config import ConfigError, read_settings
    from fl_app.runs.folder import DESCRIBED

    problems: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = read_settings(run / "config.yaml")
    except ConfigError as error:
        problems.append(str(error))
    lines, bad = read_lines(run / "leakage.jsonl")
    problems += map(str, bad)
    scores = [line["metrics"]["psnr"] for line in lines if line["metrics"].get("psnr")]
    best: dict[str, Any] = max(scores, key=lambda score: score["mean"] or 0, default={})
    # A user's own federation is described by a file; the settings of a simulation stay unused.
    own = DESCRIBED in config
    client = (DESCRIBED, "training") if own else ("client",)
    settings = {
        key: _setting(config, *where)
        for key, where in (
            ("started", ("started",)),
            ("dataset", ("dataset", "name")),
            ("optimizer", (*client, "optimizer")),
            ("lr", (*client, "lr")),
            ("attack", ("attack", "name")),
        )
    } | ({"dataset": None} if own else {})
    return {
        "run": run.name,
        "path": str(run),
        **settings,
        "lines": len(lines),
        "best_psnr": best.get("mean"),
        "mean_colour_psnr": best.get("baseline"),
        "problems": problems,
    }


def _setting(config: Mapping[str, Any], *where: str) -> str | float | None:
    """Return a setting, None where there is no such one."""
    found: Any = config
    for key in where:
        found = found.get(key) if isinstance(found, Mapping) else None
    number = type(found) is int or (isinstance(found, float) and math.isfinite(found))
    return found if number or isinstance(found, str) else None


def _run_cells(run: Mapping[str, Any]) -> list[str]:
    from rich.filesize import decimal

    scores = (run["best_psnr"], run["mean_colour_psnr"])
    return [
        run["run"],
        _cell(run["started"])[:16],
        _cell(run["dataset"]),
        f"{_cell(run['optimizer'])} {_cell(run['lr'])}",
        _cell(run["attack"]),
        str(run["lines"]),
        *("-" if score is None else f"{score:.1f}" for score in scores),
        *([decimal(run["disk_bytes"])] if "disk_bytes" in run else []),
    ]


def _cell(setting: object) -> str:
    return "-" if setting is None else printable(str(setting))


def show(
    run: RunName,
    runs_dir: RunsDir = Path("runs"),
    json_: LinesJson = False,
) -> None:
    """Show which run it is and what its attacker was given, the leakage table, and the pictures."""
    from fl_app.audit.leakage_log import LogLine, read_lines
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    lines, bad = read_lines(folder / "leakage.jsonl")
    warn(bad)
    if json_:
        keys = dict.fromkeys(field.name for field in fields(LogLine))
        print_json([keys | line for line in lines])
        return
    _print_leakage(folder, lines)


def _about(folder: Path) -> Table:
    """Return what a run is of, and what its attacker was given, as its report says it."""
    from rich.table import Table
    from rich.text import Text

    from fl_app.report.setting import setting
    from fl_app.report.source import read_source
    from fl_app.report.words import assumptions

    source = read_source(folder)
    started = source.setting("started")
    about = [("Run", f"{folder.name}, {started}" if started else folder.name), *setting(source)]
    about += [(f"Given: {each.topic.lower()}", f"{each.words} ({each.mark})")
              for each in assumptions(source) if each.topic in _GIVEN]  # fmt: skip
    table = Table.grid(padding=(0, 2))
    for name, words in about:
        table.add_row(*(Text(printable(cell)) for cell in (name, words)))
    return table


def _print_leakage(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    from fl_app.audit.defense_effect import defense_advice
    from fl_app.audit.table import leakage_table
    from fl_app.config import ConfigError

    console = screen()
    console.print(_about(folder))
    console.print(leakage_table(lines))
    try:
        advice = defense_advice(folder)
    except ConfigError as error:
        advice = ""
        warn([error])
    if advice:
        console.print(advice, soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        if line["picture"]:
            console.print(folder / line["picture"], soft_wrap=True, highlight=False)


def rounds(
    run: RunName,
    runs_dir: RunsDir = Path("runs"),
    json_: RoundsJson = False,
) -> None:
    """Show accuracy and leakage by round, and save them as rounds.md and rounds.png.

    The picture needs matplotlib. It is drawn again where the table has changed.
    """
    from fl_app.audit.rounds import read_rounds
    from fl_app.config import ConfigError
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    lines, problems = read_rounds(folder)
    warn(problems)
    if json_:
        print_json([asdict(line) for line in lines])
        return
    if not lines:
        raise ConfigError(f"{folder} has no finished round and no attack yet")
    _save_rounds(folder, lines)


def _chance_accuracy(folder: Path) -> float | None:
    """Return the accuracy of a guess, where the run says how many classes there are."""
    from fl_app.config import ConfigError, read_settings

    try:
        classes = _setting(read_settings(folder / "config.yaml"), "data", "num_classes")
    except ConfigError:
        return None
    return 1 / classes if isinstance(classes, int) and classes > 0 else None


def _save_rounds(folder: Path, lines: Sequence[RoundLine]) -> None:
    """Print the table, and write what is not as it was."""
    from fl_app.audit.rounds import rounds_cells, save_plot
    from fl_app.util.extras import MissingExtraError, extras
    from fl_app.util.files import write_text
    from fl_app.util.machine import host
    from fl_app.util.markdown import markdown_table, sections_markdown

    console = screen()
    cells = rounds_cells(lines)
    console.print(table_of(cells))
    written, picture = folder / "rounds.md", folder / "rounds.png"
    body = [*markdown_table(cells), "", _ROUNDS_NOTE]
    text = sections_markdown(folder.name, f"flowleak rounds {folder.name}", body, host())
    known = written.exists() and written.read_text(encoding="utf-8") == text
    if not known or not picture.exists():  # drawing takes more time than all else here
        try:
            with extras():
                save_plot(picture, lines, folder.name, _chance_accuracy(folder))
        except MissingExtraError as error:
            console.print(f"No picture: {error}", style="yellow", markup=False)
    write_text(written, text)
    for path in (written, picture):
        if path.exists():
            console.print(path, soft_wrap=True, highlight=False)

"""`flowleak advise`: what to do about what a run leaked, measured on its own clients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_app.commands.arguments import RunName, RunsDir
from fl_app.commands.attacks import ClientFile
from fl_app.commands.output import screen, table_of, tell

if TYPE_CHECKING:
    from fl_app.runs.advice import Advice

_COLUMNS = ("change", "leaked", "PSNR dB", "accuracy", "s", "note")


def advise(
    run: RunName,
    clients: Annotated[
        int, typer.Option(help="Updates of the first attacked round that are taken.", min=1)
    ] = 2,
    seconds: Annotated[
        float, typer.Option(help="That each attack may take; as many for every change.", min=1)
    ] = 20.0,
    rounds: Annotated[
        int,
        typer.Option(
            help="Of the federations that are trained with each change, for its cost in accuracy; "
            "0: none.",
            min=0,
        ),
    ] = 30,
    client: ClientFile = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Try changes on a run's clients: defences, larger batches, more passes; attack each again.

    The attack knows the change. Needs the clients' private images (audit.truth). Results are kept
    in advise.json in the run's folder, and stand in its report; what is there is not tried again.
    """
    from fl_app.report.writing import try_report
    from fl_app.runs.advice import best
    from fl_app.runs.advising import advise as advise_on
    from fl_app.runs.facts import open_auditor
    from fl_app.runs.folder import find_run
    from fl_app.runs.lock import only_one
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    with only_one(folder):
        rows = advise_on(open_auditor(folder, tell, client=client), clients, seconds, rounds, tell)
    chosen = best(rows)
    names = [row.change for row in chosen]
    screen().print(table_of([_COLUMNS, *(_cells(row, names) for row in rows)]))
    typer.echo(f"By attacks of {seconds:g} s. That they fail does not prove that none succeeds.")
    if not chosen:
        typer.echo("no change halves what leaks, or nothing leaks")
    try_report(folder)


def _cells(row: Advice, best: list[str]) -> list[str]:
    place = f"best {best.index(row.change) + 1}" if row.change in best else ""
    return [
        row.change,
        f"{row.leaked} of {row.of} {row.by}" if row.of else "",
        "" if row.psnr is None else f"{row.psnr:.1f}",
        "" if row.accuracy is None else f"{row.accuracy:.1%}",
        f"{row.seconds:.0f}",
        row.problem or place,
    ]

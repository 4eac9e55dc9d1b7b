"""`flowleak advise`: what to do about what a run leaked, measured on its own clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fl_app.commands.arguments import RunName, RunsDir
from fl_app.commands.attacks import ClientFile
from fl_app.commands.output import screen, table_of, tell


def advise(
    run: RunName,
    clients: Annotated[
        int, typer.Option(help="Updates of the first attacked round that are taken.", min=1)
    ] = 2,
    seconds: Annotated[
        float,
        typer.Option(
            help="Of one core that each attack may take; as many for every change.", min=1
        ),
    ] = 40.0,
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
    in advise.json in the run's folder, drawn in advise.svg, and stand in its report. What is there
    is not tried again.
    """
    from fl_app.report.tables import advice_cells
    from fl_app.report.writing import try_report, write_drawing
    from fl_app.runs.advice import best
    from fl_app.runs.advising import advise as advise_on
    from fl_app.runs.facts import open_auditor
    from fl_app.runs.folder import find_run
    from fl_app.runs.lock import only_one
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    with only_one(folder):
        rows = advise_on(open_auditor(folder, tell, client=client), clients, seconds, rounds, tell)
    screen().print(table_of(advice_cells(rows)))
    typer.echo(f"By attacks of {seconds:g} s. That they fail does not prove that none succeeds.")
    if not best(rows):
        typer.echo("no change halves what leaks, or nothing leaks")
    drawing = write_drawing(rows, folder)
    typer.echo(drawing or "accuracy was not measured of two changes, so that nothing is drawn")
    try_report(folder)

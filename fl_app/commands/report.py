"""`flowleak report`, `view` and `export`: a run for whoever decides on it. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fl_app.commands.arguments import RunName, RunsDir


def report(
    run: RunName,
    redact: Annotated[
        bool,
        typer.Option(
            "--redact",
            help="Scores alone, to pass on: no private or reconstructed picture, no class of an "
            "image, no path of this machine.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; default: report.html in the run's folder, or report-redacted.html."
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a run's report: one HTML file, from the verdict down to each image."""
    from fl_app.commands.output import warn
    from fl_app.report.collect import collect
    from fl_app.report.writing import write_report
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    made = collect(folder, redact)
    warn(made.problems)
    typer.echo(write_report(made, folder, out))


def view(
    run: RunName = "",
    port: Annotated[
        int, typer.Option(help="Port of the loopback; 0: any that is free.", min=0, max=65535)
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Show a run's report in the browser, or without a run a list of all; until Ctrl-C.

    The page is served to this machine alone, by an address that nobody can guess.
    """
    from fl_app.report.serving import Serving
    from fl_app.runs.folder import find_run, list_runs
    from fl_app.util.files import runs_folder

    folder = runs_folder(str(runs_dir))
    found = [find_run(folder, run)] if run else list_runs(folder)
    with Serving(found, port) as serving:
        typer.echo(serving.address)
        if browser:
            _open(serving.address)
        try:
            serving.serve()
        except KeyboardInterrupt:
            typer.echo("ended")


def _open(address: str) -> None:
    """Open a page in the user's browser; one in the terminal would take it over."""
    import os
    import sys
    import webbrowser

    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    if sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in screens):
        webbrowser.open(address)


def export(
    run: RunName,
    format_: Annotated[
        str, typer.Option("--format", help="csv, or parquet, which needs pyarrow (extra data).")
    ] = "csv",
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: images.FORMAT in the run's folder.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write a run's log as a table with a row for each image, attack and update."""
    from fl_app.audit.export import write_export
    from fl_app.audit.leakage_log import read_lines
    from fl_app.commands.output import warn
    from fl_app.runs.folder import find_run
    from fl_app.util.files import runs_folder

    folder = find_run(runs_folder(str(runs_dir)), run)
    lines, bad = read_lines(folder / "leakage.jsonl")
    warn(bad)
    path = out or folder / f"images.{format_}"
    count = write_export(path, lines, format_)
    typer.echo(f"{path}: {count:,} rows")

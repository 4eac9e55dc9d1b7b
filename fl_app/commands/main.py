"""The command `flowleak`: look at runs, attack them again, train priors, run benchmarks."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from fl_app.commands.advise import advise
from fl_app.commands.attacks import attack, score
from fl_app.commands.bench import bench_app
from fl_app.commands.check import check
from fl_app.commands.delete import delete
from fl_app.commands.group import group
from fl_app.commands.listing import list_choices
from fl_app.commands.prior import prior_app
from fl_app.commands.report import export, report, view
from fl_app.commands.runs import rounds, runs, show
from fl_app.commands.state import train_state
from fl_app.lan.commands import lan_app
from fl_app.util.extras import extras

app = group(
    "A privacy audit of federated learning: look at runs, attack them again, measure attacks.",
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # keys are among them
)
for command in (
    runs, show, rounds, report, view, export, check, attack, score, advise, delete, train_state,
):  # fmt: skip
    app.command()(command)
app.command("list")(list_choices)
app.add_typer(bench_app, name="bench")
app.add_typer(prior_app, name="prior")
app.add_typer(lan_app, name="lan")


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"flowleak {metadata.version('flowleak')}")
        raise typer.Exit


@app.callback()
def _settings(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Print the version, and exit."
        ),
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command; what a user can mend is one line, not a traceback."""
    try:
        with extras():
            app()
    except (ValueError, OSError) as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text(f"flowleak: {error}", style="red"), soft_wrap=True)
        raise SystemExit(2) from error

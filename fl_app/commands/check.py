"""`flowleak check`: whether a client's description is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fl_app.commands.output import screen
from fl_app.util.importing import imported


def check(
    client: Annotated[
        Path,
        typer.Argument(help="The file that describes the clients (flowleak.Client). It is run."),
    ] = Path("audit.py"),
    before: Annotated[
        Path | None,
        typer.Argument(help="Weights to start from (.pt, .pth, .safetensors, .npz); default: new."),
    ] = None,
    trains: Annotated[
        str,
        typer.Option(
            help="Your own training function, as package.module:function, to be held to the "
            "description on made-up images. Arguments are filled in by their names: net or model, "
            "trainloader (or images and labels), epochs, lr, device."
        ),
    ] = "",
    examples: Annotated[
        int, typer.Option(help="Made-up images; default: two batches and one.", min=0)
    ] = 0,
) -> None:
    """Check a description of clients: whether they can be simulated, and train as it says.

    Ends with 1 where something is wrong.
    """
    from fl_app.runs.checking import check_description, check_own, run_own, sample
    from fl_app.runs.described import load_client
    from fl_app.runs.weights import read_weights

    described = load_client(client)
    function = _function(trains) if trains else None
    given = sample(described, read_weights(before) if before else None, examples)
    console, wrong = screen(), 0
    findings = list(check_description(described, given))
    if function:
        findings += check_own(described, run_own(function, described, given), given)
    for finding in findings:
        wrong += not finding.ok
        mark = "[green]ok[/]" if finding.ok else "[bold red]!![/]"
        console.print(mark, end="  ")
        console.print(finding.words, markup=False, highlight=False, soft_wrap=True)
    if not function:
        console.print("Not checked: whether your clients train so; --trains MODULE:FUNCTION does.")
    if wrong:
        raise typer.Exit(1)


def _function(name: str) -> Callable[..., Any]:
    """Return a function that the user named, by module:function."""
    from fl_app.config import ConfigError

    try:
        found = imported(name)
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(
            f"trains is {name!r}, which can't be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"trains is {name!r}, which is no function")
    return found  # type: ignore[no-any-return]

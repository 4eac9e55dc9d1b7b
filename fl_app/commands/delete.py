"""`flowleak delete`: a run's end. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_app.commands.arguments import RunName, RunsDir
from fl_app.commands.output import screen, table_of

if TYPE_CHECKING:
    from fl_app.runs.deleting import Part


def delete(
    run: RunName,
    private_only: Annotated[
        bool,
        typer.Option(
            "--private-only",
            help="Remove what shows private images or leads to them: truth, observations, "
            "reconstructions, their queue and pictures, the images' classes in the log. Scores, "
            "tables and global models stay.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Delete a run's folder, or what is private in it; say what goes, and ask."""
    from fl_app.runs.deleting import delete_run, parts, private_images
    from fl_app.runs.folder import find_run
    from fl_app.runs.lock import only_one
    from fl_app.util.files import user_path

    folder = find_run(user_path(str(runs_dir)), run)
    going = parts(folder, private_only)
    with only_one(folder, wait=False):
        pass  # refused before anything is asked
    if not going:
        typer.echo(f"Nothing to do: {folder} holds nothing private")
        return
    console = screen()
    console.print(table_of([["goes", "files", "on disk"], *_cells(going)]))
    images = private_images(folder)
    count = "an unknown number of" if images is None else f"{images}"
    console.print(f"The clients left {count} private images there.", highlight=False)
    if not _described(folder) and not (folder / "training.json").exists():
        console.print("Its training has not ended, or was ended early.", style="yellow")
    if not yes:
        typer.confirm(f"Delete {'these from ' if private_only else ''}{folder}?", abort=True)
    for path in delete_run(folder, private_only):
        typer.echo(f"Left: {path}, which no run makes; it may show private images")


def _described(folder: Path) -> bool:
    """Say whether the clients were a user's own: their training is not ours to have ended."""
    from fl_app.config import ConfigError, read_settings
    from fl_app.runs.folder import DESCRIBED

    try:
        return DESCRIBED in read_settings(folder / "config.yaml")
    except ConfigError:
        return False


def _cells(going: Sequence[Part]) -> list[list[str]]:
    from rich.filesize import decimal

    rows = [[part.path.name, str(part.files), decimal(part.bytes)] for part in going]
    total = sum(part.files for part in going), sum(part.bytes for part in going)
    return [*rows, ["all", str(total[0]), decimal(total[1])]]

"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _run_names(incomplete: str) -> list[str]:
    """Complete a run's name in the shell, among those of the default folder."""
    from fl_app.runs.folder import list_runs
    from fl_app.util.files import user_path

    return [run.name for run in list_runs(user_path("runs")) if run.name.startswith(incomplete)]


RunName = Annotated[
    str,
    typer.Argument(help="A run's name, as flowleak runs lists it.", autocompletion=_run_names),
]
RunsDir = Annotated[
    Path, typer.Option(help="Folder that holds the runs; the setting runs_dir of their run.")
]
DatasetChoice = Annotated[
    str,
    typer.Option(
        help="A name that flowleak list datasets prints, or a folder of parquet files or of "
        "train/CLASS/ and test/CLASS/."
    ),
]
Weights = Annotated[
    str,
    typer.Argument(help="A name that flowleak list priors prints, or a .safetensors file."),
]

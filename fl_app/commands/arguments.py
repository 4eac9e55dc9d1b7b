"""Arguments that several commands take, and what they mean. Nothing slow is imported here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fl_app.config import DatasetConfig


def _run_names(incomplete: str) -> list[str]:
    """Complete a run's name in the shell, among those of the default folder."""
    from fl_app.runs.folder import list_runs
    from fl_app.util.files import runs_folder

    return [run.name for run in list_runs(runs_folder()) if run.name.startswith(incomplete)]


_RUN = typer.Argument(
    help="A run's name, as `flowleak runs` lists it, or its folder's path.",
    autocompletion=_run_names,
)
RunName = Annotated[str, _RUN]
RunsDir = Annotated[
    Path, typer.Option(help="Folder that holds the runs; the setting runs_dir of their run.")
]
DatasetChoice = Annotated[
    str,
    typer.Option(
        help="A data set's name (`flowleak list datasets`), or a folder of parquet files or of "
        "class folders."
    ),
]
Weights = Annotated[
    str,
    typer.Argument(
        help="A prior's name (`flowleak list priors`), a .safetensors file, or hub:OWNER/NAME."
    ),
]


def typed_path(path: str) -> str:
    """Return a path that was typed, as an absolute one: from the working folder."""
    return str(Path(path).expanduser().absolute())


def whole_numbers(name: str, text: str) -> list[int]:
    """Return the numbers of an option such as ``1,4,16``.

    Raises
    ------
    ConfigError
        If it is something else, or one of them is 0.
    """
    from fl_app.config import ConfigError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{name} is {text!r}; allowed: numbers of 1 or more, such as 1,4,16")
    return [int(part) for part in parts]


def lpips_folder(weights: str) -> str:
    """Return where LPIPS' weights are, as typed: nowhere, to be downloaded, or a path."""
    return weights if weights in ("", "download") else typed_path(weights)


def prior_weights(weights: str) -> str:
    """Return a prior's name as it is, and the path of a file as `typed_path` does.

    One of the hub is downloaded: what a run names later is not.

    Raises
    ------
    ValueError
        If it can't be.
    """
    from fl_app.config import HUB

    if weights.startswith(HUB):
        from server_strategies.priors.places import find_weights

        find_weights(weights)
        return weights
    return typed_path(weights) if weights.endswith(".safetensors") else weights


def dataset_config(choice: str) -> DatasetConfig:
    """Return the data set that a name or a folder means.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    from fl_app.config import ConfigError, load_config

    if re.fullmatch(r"\w+", choice) and not Path(choice).is_dir():
        return load_config({"dataset": choice}).dataset
    if not Path(choice).is_dir():
        raise ConfigError(f"dataset is {choice!r}: no known name, and no such folder")
    name = "imagefolder"
    if any(Path(choice).rglob("*.parquet")):
        name = named_after(Path(choice).resolve().name)
    source = shlex.quote(f"dataset.source={typed_path(choice)}")
    return load_config({"dataset": name, "overrides": source}).dataset


def named_after(folder: str) -> str:
    """Return the public data set whose name a folder's holds; CIFAR-10 where there is none."""
    from fl_app.data.hub import LAYOUTS

    plain = re.sub(r"[\W_]", "", folder.lower())
    longest_first = sorted(LAYOUTS, key=len, reverse=True)  # cifar100 holds cifar10
    return next((name for name in longest_first if name.replace("_", "") in plain), "cifar10")

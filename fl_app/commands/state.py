"""The command `flowleak train-state`. It imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from fl_app.commands.arguments import DatasetChoice, dataset_config


def train_state(
    state: Annotated[str, typer.Argument(help="epoch-N, N from 1, or converged.")],
    dataset: DatasetChoice = "cifar10",
    model: Annotated[str, typer.Option(help="Of the federation.")] = "convnet",
    norm: Annotated[
        str, typer.Option(help="By what its activations are normalised; empty: its default.")
    ] = "",
    head: Annotated[str, typer.Option(help="Before its classifier; empty: its default.")] = "",
) -> None:
    """Train a federation's model for benchmarks to start from; an epoch that is there is kept."""
    from fl_app.benchmarks.states import states_folder, trained_state
    from fl_app.commands.output import screen

    console = screen()

    found = trained_state(dataset_config(dataset), model, norm, head, state, console.print)
    console.print(f"{state}: accuracy {found.accuracy:.1%}, in {states_folder()}", soft_wrap=True)

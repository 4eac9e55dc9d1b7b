"""A group of commands whose `--help` says what each argument allows."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import click
import typer
from typer.core import TyperArgument, TyperGroup


class Group(TyperGroup):
    """What typer makes, with the help of arguments.

    Up to 0.20 typer sets an argument's help before it calls click's constructor. From
    click 8.5 on that has a help of its own, and sets it to None.
    """

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name, described."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.callback is not None:
            _describe(command.params, inspect.unwrap(command.callback))
        return command


def group(help_: str, **settings: Any) -> typer.Typer:
    """Return an empty group of commands, which shows its help where no command is named."""
    return typer.Typer(cls=Group, help=help_, no_args_is_help=True, **settings)


def _describe(parameters: list[click.Parameter], function: Any) -> None:
    """Give arguments the help that their annotations hold."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            for about in getattr(hints[str(parameter.name)], "__metadata__", ()):
                parameter.help = about.help

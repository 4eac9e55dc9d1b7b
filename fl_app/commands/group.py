"""A group of commands whose `--help` says what each argument allows."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import click
import typer
from click.shell_completion import CompletionItem
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


class DefaultGroup(Group):
    """A group whose first command is meant where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the first command's name before what is not the name of another."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return what the first command's first argument may be, beside the other commands."""
        first, *others = self.commands.values()
        found = first.params[0].shell_complete(ctx, incomplete)
        names = [str(each.name) for each in others]
        return [*found, *(CompletionItem(name) for name in names if name.startswith(incomplete))]


def group(help_: str, cls: type[Group] = Group, **settings: Any) -> typer.Typer:
    """Return an empty group of commands, which shows its help where no command is named."""
    return typer.Typer(cls=cls, help=help_, no_args_is_help=True, **settings)


def _describe(parameters: list[click.Parameter], function: Any) -> None:
    """Give arguments the help that their annotations hold."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            for about in getattr(hints[str(parameter.name)], "__metadata__", ()):
                parameter.help = about.help

"""The command `flowleak`, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from fl_app.commands.main import app


def flowleak(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output

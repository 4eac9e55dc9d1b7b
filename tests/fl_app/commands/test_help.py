"""What every command costs and says before it does anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from helpers.command import flowleak
from typer.testing import CliRunner

from fl_app.audit.leakage_log import LogLine, append_line
from fl_app.commands.main import app
from fl_app.config import load_config
from fl_app.runs.folder import create_run

# Each of them costs more than all else that these commands do.
REFUSED = (
    "torch", "ray", "flwr", "numpy", "scipy", "skimage", "PIL", "pandas", "httpx", "cryptography",
)  # fmt: skip
REFUSING = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED}:
            raise AssertionError(name)

sys.meta_path.insert(0, Refuse())
from flowleak.__main__ import main
main()
"""
QUICK = (
    "--help", "--version", "lan --help", "bench --help", "bench status --help",
    "prior train --help", "list attacks", "list models --json", "runs", "show x", "rounds x",
    "export x",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was attacked, and shown by round once."""
    folder = tmp_path_factory.mktemp("runs")
    run = create_run(load_config({"overrides": f"runs_dir={folder} name=x"}))
    score = {"mean": 20.0, "low": None, "high": None, "baseline": 12.0}
    for node in (7, 8):
        line = LogLine(1, str(node), node, "sme", "ok", "counts", metrics={"psnr": score})
        append_line(run / "leakage.jsonl", line)
    flowleak("rounds", "x", "--runs-dir", str(folder))
    return folder


def arguments(command: str, runs_dir: Path) -> list[str]:
    reads = command.split()[0] in ("runs", "show", "rounds", "export")
    return [*command.split(), *(["--runs-dir", str(runs_dir)] if reads else [])]


@pytest.mark.parametrize("command", QUICK)
def test_a_command_that_only_looks_imports_nothing_slow(command: str, runs_dir: Path) -> None:
    words = arguments(command, runs_dir)
    done = subprocess.run([sys.executable, "-c", REFUSING, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 10


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[click.Command, tuple[str, ...]]]:
    yield command, path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


def packed(text: str) -> str:
    """Return text without what a box around it, and its width, make of it."""
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


def test_help_says_what_every_argument_and_option_allows() -> None:
    tree = dict((path, command) for command, path in commands(typer.main.get_command(app)))
    assert len(tree) > 15
    for path, command in tree.items():
        shown = flowleak(*path, "-h")
        assert command.help and packed(command.help.split("\n")[0]) in packed(shown)
        for parameter in command.params:
            about = getattr(parameter, "help", None)
            assert about, (path, parameter.name)
            assert packed(about) in packed(shown), (path, parameter.name)


def test_the_version_and_completion() -> None:
    assert re.fullmatch(r"flowleak \d+\.\d+\.\d+\n", flowleak("--version"))
    for words, expected in (
        ("list m", ["models"]), ("bench st", ["states", "status"]), ("bench qu", ["quick"])
    ):  # fmt: skip
        complete = {
            "_FLOWLEAK_COMPLETE": "complete_bash",
            "COMP_WORDS": f"flowleak {words}",
            "COMP_CWORD": "2",
        }
        shown = CliRunner().invoke(app, env=complete, prog_name="flowleak").output
        assert shown.split() == expected


@pytest.mark.parametrize("command", ["runs", "show x", "rounds x", "list models"])
def test_json_is_all_that_is_printed(command: str, runs_dir: Path) -> None:
    found = json.loads(flowleak(*arguments(command, runs_dir), "--json"))
    keys = {"runs": "best_psnr", "show": "matching", "rounds": "scores", "list": "description"}
    assert found and all(keys[command.split()[0]] in entry for entry in found)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for entry in found for key in entry)

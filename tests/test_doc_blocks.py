"""Every block and inline command of README and docs: code runs, commands are what they say.

A page is a user's session. Its blocks run in order, in a folder of their own with the example
federation, a client's update and a run in it; an attack makes one iteration. Python continues what
the page's earlier Python defined; a block that begins with ``# NAME.py`` is that file; of a diff
the added lines run. Commands go through the parsers of `flowleak` and `flwr`, settings through the
project's; what is cheap is run. ``pytest -m slow`` runs what takes minutes, too.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest.mock import MagicMock

import click
import pytest
import torch
import typer
from flwr.cli.app import app as flwr_app
from flwr.common.config import parse_config_args
from flwr.serverapp.strategy import FedAvg
from helpers.blocks import Code, blocks, code, commands
from helpers.command import flowleak
from helpers.reports import Pretence
from typer.testing import CliRunner

from fl_app.commands.attacks import _attack_config
from fl_app.commands.main import app
from fl_app.config import Config, load_config
from fl_app.protocol import Budget, Client
from fl_app.registry import ATTACKS, BENCHMARKS, MODELS, REGISTRIES, Entry
from fl_app.runs.checking import sample, trained
from fl_app.runs.described import load_client
from server_strategies.attacks.attack import Attack

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "quickstart"
PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
PARSERS = {
    "flowleak": typer.main.get_command(app),
    "flwr": typer.main.get_command(flwr_app),
}

# The longest beginning counts. Of a command that is parsed alone: why, and what does run it.
RUN = (
    "flowleak runs", "flowleak show", "flowleak rounds", "flowleak report", "flowleak export",
    "flowleak list", "flowleak delete", "flowleak lan init", "flowleak lan status",
    "flowleak lan renew",
)  # fmt: skip
NIGHTLY = {
    "flowleak check": "trains the example's client under a dozen descriptions",
    "flowleak attack --before": "a whole search",
}
PARSED = {
    "flwr": "starts Flower, or asks it: test_end_to_end.py",
    "flowleak attack": "a search, of a real run: tests/fl_app/runs/test_attacking.py",
    "flowleak advise": "a quarter of an hour: test_advising.py",
    "flowleak score": "needs private images: test_pairs.py",
    "flowleak view": "serves until Ctrl-C: test_serving.py",
    "flowleak bench status": "test_docs.py runs it",
    "flowleak bench": "minutes to hours on CIFAR-10: tests/fl_app/benchmarks",
    "flowleak train-state": "minutes to hours on CIFAR-10: tests/fl_app/benchmarks",
    "flowleak prior": "minutes to hours on pictures: tests/fl_app/commands/test_prior.py",
    "flowleak lan": "waits for other machines: test_lan.py",
}
NIGHTLY_PYTHON = {
    "load_split(data": "trains federations, on CIFAR-10; here on the photographs that ship",
    "from transformers": "takes seconds to import",
}
OTHER_PROGRAMS = {
    "docker", "export", "find", "flower-superexec", "flower-superlink", "flower-supernode", "kill",
    "bash", "pgrep", "pytest", "ray", "scp", "sha256sum", "sort", "tensorboard", "xargs",
}  # fmt: skip
STANDS_FOR = {
    "RUN": "audit", "RUN_ID": "1", "DIR/RUN": "runs/audit", "PATH": "runs/audit",
    "$focus": "0.8", "FOLDER_OR_cifar10": "cifar10", "FOLDER_OR_tiny_imagenet": "tiny_imagenet",
}  # fmt: skip
ASSIGNMENT = re.compile(r"[A-Z_]+=")
GROUPS = [each.name for each in dataclasses.fields(Config)]  # of settings
ABSENT = ("mlflow", "wandb")  # a page's packages that are none of ours
AFTERWARDS = {
    "README.md": "assert '5 images' in str(verdict) and open('leak.png', 'rb').read()",
    "docs/log.md": """
import json
line = json.loads(open("runs/audit/leakage.jsonl").readline()) | {"folder": "runs/audit"}
wandb_line(line), mlflow_line(line)
assert mlflow.log_metric.called and wandb.Image.called
""",
}


class BrokenPageError(AssertionError):
    """A page's code that does not hold; the message begins with page and line."""


@dataclass
class Desk:
    """A page's session: its folder is the working folder.

    Attributes
    ----------
    page : str
    night : bool
        Whether what takes minutes is run, too.
    names : dict
        What the page's Python has defined so far.
    """

    monkeypatch: pytest.MonkeyPatch
    page: str = ""
    night: bool = False
    names: dict[str, Any] = field(default_factory=lambda: {"strategy": FedAvg()})

    @contextmanager
    def at(self, line: int) -> Iterator[None]:
        """Name the page and the line of whatever fails."""
        try:
            yield
        except BrokenPageError:
            raise
        except (Exception, SystemExit) as error:
            raise BrokenPageError(f"{self.page}:{line}: {type(error).__name__}: {error}") from error

    def read(self, page: str) -> None:
        """Check a page's code in order."""
        self.page = page
        for each in code(ROOT / page):
            with self.at(each.line):
                assert each.language in CHECKS, f"{each.language!r} is no known kind of block"
                CHECKS[each.language](each, self)
        self.python(AFTERWARDS.get(page, ""), 1)

    def python(self, source: str, line: int) -> None:
        """Run statements; a user's two files are there when the first one names them."""
        for statement in ast.increment_lineno(ast.parse(source), line - 1).body:
            with self.at(statement.lineno):
                if "before.pt" in ast.unparse(statement):
                    leave_update(self.names.get("client") or load_client(Path("audit.py")))
                whole = ast.Module([statement], [])
                exec(compile(whole, self.page, "exec"), self.names)

    def command(self, words: list[str]) -> None:
        """Parse a command, and run it where it is cheap."""
        bare = itertools.dropwhile(ASSIGNMENT.match, words)
        program, *arguments = (STANDS_FOR.get(word, word) for word in bare)
        if program == "pip":
            check_extras(arguments)
        elif program in PARSERS:
            check_command(program, *arguments)
            typed = " ".join(words)
            listed = (each for each in (*RUN, *NIGHTLY, *PARSED) if typed.startswith(each))
            kind = max(listed, key=len)
            if kind in RUN or (kind in NIGHTLY and self.night):
                if "before.pt" in words:
                    leave_update(load_client(Path("audit.py")))
                done = CliRunner().invoke(app, arguments, input="y\n")
                assert done.exit_code == 0, done.output or done.exception
        else:
            assert program in OTHER_PROGRAMS, f"{program} is in no list of this test"


def leave_update(client: Client) -> None:
    """Write the weights before and after a client's training on five images."""
    given = sample(client, examples=5)
    torch.save(given.w0, "before.pt")
    torch.save(trained(client, client.training, given), "after.pt")


def context_of(program: str, arguments: list[str]) -> click.Context:
    """Return what a command's own parser makes of its arguments."""
    context = PARSERS[program].make_context(program, arguments)
    while isinstance(context.command, click.Group):
        left = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = context.command.resolve_command(context, left)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context


@cache
def check_command(program: str, *arguments: str) -> None:
    """Check a command's words, options, and the names and settings that they hold."""
    context = context_of(program, list(arguments))
    given = context.params
    if context.command_path == "flwr run" and given["run_config_overrides"]:
        load_config(parse_config_args(given["run_config_overrides"]))
    elif context.command_path == "flowleak bench run":
        assert given["name"] in (*BENCHMARKS, "NAME"), f"no benchmark is {given['name']}"
    elif context.command_path == "flowleak attack" and given["attack"]:
        for name in given["attack"].split(","):
            if name != "all":
                _attack_config(name, given["set_"] or [])


def check_extras(arguments: list[str]) -> None:
    """Check that the extras of a package of ours are there."""
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for found in re.findall(r"(?:^|flowleak|\.)\[(.*)\]", " ".join(arguments)):
        assert set(found.split(",")) <= set(offered["optional-dependencies"])


def python(block: Code, desk: Desk) -> None:
    if not desk.night and any(words in block.text for words in NIGHTLY_PYTHON):
        compile(block.text, desk.page, "exec")
        return
    if name := re.match(r"# (\w+\.py)\n", block.text):
        Path(name[1]).write_text(block.text)
    desk.python(block.text.replace("cifar10", "photos"), block.line)


def bash(block: Code, desk: Desk) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    if "${" in block.text:  # a script with variables: test_docs.py reads its options
        return
    for line, words in commands(block.text):
        with desk.at(block.line + line):
            desk.command(words)


def diff(block: Code, desk: Desk) -> None:
    added = [line[1:] for line in block.text.splitlines() if line.startswith("+")]
    for line in added:
        desk.python(dedent(line), block.line)


def toml(block: Code, desk: Desk) -> None:
    """Check a package's file, and offer what its entry points name."""
    points = tomllib.loads(block.text)["project"]["entry-points"]
    for registry, group in ((ATTACKS, "flowleak.attacks"), (MODELS, "flowleak.models")):
        for name, target in points[group].items():
            desk.monkeypatch.setitem(registry.entries, name, Entry(name, target, "a page's"))


def inline(code: Code, desk: Desk) -> None:
    """Check commands, settings, files and names of Python; the rest is taken for words."""
    text = code.text
    if re.match(r"(flowleak|flwr|pip) ", text):
        (_, (program, *words)), *_ = commands(text.replace(" ... ", " "))
        words = [STANDS_FOR.get(word, word) for word in words]
        with suppress(click.MissingParameter):  # a sentence may name a command alone
            check_extras(words) if program == "pip" else check_command(program, *words)
    elif found := re.fullmatch(r"(?:-c ')?overrides=\"(.*)\"'?", text):
        load_config({"overrides": found[1]})
    elif re.fullmatch(rf"({'|'.join(GROUPS)})\.[\w.]+=\S+", text):
        load_config({"overrides": f"rounds=50 {text}"})
    elif (found := re.fullmatch(r"flowleak\.([\w.]+)", text)) and found[1] not in REGISTRIES:
        pkgutil.resolve_name(text)
    elif re.match(r"(conf|docs|examples|tests|fl_app|client_app|server_strategies)/", text):
        assert re.search("[A-Z*]", text) or (ROOT / text).exists(), f"{text} is no file"


CHECKS: dict[str, Callable[[Code, Desk], None]] = {
    "python": python, "bash": bash, "diff": diff, "toml": toml, "inline": inline,
    "text": lambda code, desk: None,  # output, formulas, trees of files
}  # fmt: skip


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a page's reader has it."""
    made = tmp_path_factory.mktemp("pages") / "example"
    shutil.copytree(EXAMPLE, made)
    run = Pretence().write(made / "runs", "audit")
    for name in ("runs/audit-2", "runs/states", "leak"):
        shutil.copytree(run, made / name)
    return made


@pytest.fixture
def desk(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A session in a copy of that folder; nothing is left of what it imports from there."""
    folder = shutil.copytree(example, tmp_path / "page")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("FLWR_HOME", str(folder / "flwr"))
    # What `flowleak.watch` does when the user's program ends.
    monkeypatch.setattr("fl_app.runs.watching.atexit", MagicMock())
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    before = set(sys.modules)
    yield Desk(monkeypatch)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_holds(
    page: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Attack.__call__

    def brief(self: Attack, *given: Any, budget: Budget | None = None, **rest: Any) -> Any:
        return whole(self, *given, budget=Budget(iterations=1), **rest)

    monkeypatch.setattr(Attack, "__call__", brief)
    desk.read(page)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```bash\nflowleak runs\nflowleak report audit --reduct\n```", "3: NoSuchOption"),
        ("```bash\nflowleak rapport\n```", r"2: \w+: No such command 'rapport'"),
        ("```bash\nflwr run . -c 'overrides=\"client.rl=1\"'\n```", "2: ConfigError: client.rl"),
        ("```python\nx = 1\nprint(y)\n```", "3: NameError"),
        ("```ini\nx = 1\n```", "2: AssertionError: 'ini' is no known kind of block"),
        ("As `fl_app/nowhere.py` says.", "1: AssertionError: fl_app/nowhere.py is no file"),
        ("Set `audit.label=counts`.", "1: ConfigError: audit.label"),
    ],
)
def test_a_broken_page_is_named_with_its_line(text: str, words: str, desk: Desk) -> None:
    Path("page.md").write_text(text)
    with pytest.raises(BrokenPageError, match=f"page.md:{words}"):
        desk.read(str(Path("page.md").absolute()))


def slow_pages() -> list[str]:
    words = "|".join(map(re.escape, (*NIGHTLY, *NIGHTLY_PYTHON)))
    block = re.compile(f"^[^`\n]*({words})", re.MULTILINE)  # a sentence has it in backticks
    return [page for page in PAGES if block.search((ROOT / page).read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", slow_pages())
def test_blocks_that_take_minutes_hold(page: str, desk: Desk) -> None:
    desk.night = True
    desk.read(page)


@pytest.mark.slow
def test_what_check_says_of_a_wrong_momentum(desk: Desk) -> None:
    audit = Path("audit.py")
    audit.write_text(audit.read_text().replace("    momentum=0.9,\n", ""))
    said = flowleak("check", "audit.py", "--trains", "pytorchexample.task:train")
    shown, _ = blocks(ROOT / "docs" / "your-federation.md", "text")
    for line in shown.splitlines():
        assert re.sub(r"\d+%", "%", line) in re.sub(r"\d+%", "%", said)

"""What the documents and examples show: tables and links that hold, code that runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command import flowleak
from typer.main import get_command

from fl_app.commands.main import app
from fl_app.registry import ATTACKS, OURS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "docs" / "results" / "README.md",
    ]
)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def run_python(*arguments: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip


def test_the_example_runs_and_is_short(tmp_path: Path) -> None:
    example = ROOT / "examples" / "attack_one_update.py"
    lines = example.read_text().splitlines()[1:]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) < 15
    run_python(str(example), folder=tmp_path)
    assert (tmp_path / "leak.png").exists()


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "attack_update" in api and "LocalTraining" in api


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "examples" / "audit.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    (tmp_path / "audit.py").write_text("\n".join(code))
    assert "4 images" in run_python("audit.py", folder=tmp_path)
    assert (tmp_path / "leak.png").exists()


def anchors(document: Path) -> set[str]:
    """Return the names that a link to a document may end in, as GitHub makes them."""
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*plain, *re.findall(r'<a name="([^"]+)">', text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_between_documents_resolve(document: Path) -> None:
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    broken = []
    for link in _LINK.findall(text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def block(document: str, name: str) -> str:
    """Return what a command put between the markers of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found
    return found[1].strip()


def test_the_list_of_tables_is_that_of_the_files() -> None:
    shown = flowleak("bench", "status", str(ROOT / "docs" / "results"), "--markdown")
    assert block("docs/results/README.md", "tables") == shown.strip()


def test_rows_in_the_repository_are_small() -> None:
    rows = (ROOT / "docs" / "results").glob("*.json*")
    assert sum(file.stat().st_size for file in rows) < 1_000_000


def options() -> list[tuple[str, ...]]:
    """Return our attacks' constants: attack, option, default, allowed, meaning."""
    ours = [name for name, entry in ATTACKS.entries.items() if entry.package == OURS]
    return [
        (name, option.name, plain(option.default), option.allowed, option.help)
        for name in ours
        for option in ATTACKS[name].options()
    ]


def plain(value: object) -> str:
    """Return a value as it is typed in the configuration."""
    return value if isinstance(value, str) else json.dumps(value)


def test_the_table_of_options_is_that_of_the_fields() -> None:
    lines = block("docs/attacks.md", "options").splitlines()[2:]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ").replace("`", "")) for line in lines]
    assert [tuple(cell.replace(r"\|", "|") for cell in row) for row in rows] == options()


def test_the_script_for_a_gpu_names_options_that_exist() -> None:
    found = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)
    assert found
    lines = found[1].replace("\\\n", " ").splitlines()
    commands = [line.partition("flowleak ")[2] for line in lines if "flowleak " in line]
    assert len(commands) == 5
    for words in map(shlex.split, commands):
        command: Any = get_command(app)
        for word in words[:2]:
            command = command.commands[word]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words

"""The wall: an attacker's code can't reach what only the auditor may see.

Imports are read from the source, not from a running process, so that one
inside a function counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("fl_app", "client_app", "server_strategies")
ROOT = Path(__file__).parents[1]
# A client leaves its Truth and never reads one.
WRITING = (
    "fl_app.audit",
    "fl_app.audit.truth",
    "fl_app.audit.truth.Truth",
    "fl_app.audit.truth.write_truth",
)


class Imports:
    """Which modules of a source tree import what."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, Path] = {}
        for package in PACKAGES:
            for file in sorted((root / package).rglob("*.py")):
                parts = file.relative_to(root).with_suffix("").parts
                self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        self.direct = {module: frozenset(self._direct(module)) for module in self.files}

    def _nodes(self, module: str) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.files[module].read_text(encoding="utf-8")))

    def modules_named(self, module: str) -> set[str]:
        """Return what a module imports by ``import a.b``, not by ``from``."""
        nodes = (node for node in self._nodes(module) if isinstance(node, ast.Import))
        return {alias.name for node in nodes for alias in node.names}

    def _direct(self, module: str) -> Iterator[str]:
        """Yield what a module imports, by full names, ``from a import b`` as both a and a.b."""
        package = module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]
        for node in self._nodes(module):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                first = node.args[0]
                if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                    yield str(first.value)

    def reached(self, module: str) -> dict[str, list[str]]:
        """Return every name that importing `module` reaches, with the way there."""
        ways: dict[str, list[str]] = {}
        # A module's packages are imported before it.
        queue = [(name, [module]) for name in (*_packages(module), module)]
        while queue:
            name, way = queue.pop(0)
            if name in ways:
                continue
            ways[name] = way
            for imported in self.direct.get(name, ()):
                queue += [(step, [*way, imported]) for step in (*_packages(imported), imported)]
        return ways


def _packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _under(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def breaches(root: Path) -> list[str]:
    """Return every breach of the wall in a source tree, in words."""
    imports = Imports(root)
    found = []
    for module in imports.files:
        forbidden: tuple[str, ...] = ()
        if _under(module, ("server_strategies",)):
            forbidden += ("fl_app.audit", "fl_app.server_app", "client_app")
        if _under(module, ("server_strategies.attacks",)):
            forbidden += ("flwr", "ray")
        for name, way in imports.reached(module).items():
            if _under(name, forbidden):
                found.append(f"{module} reaches {name} by {' -> '.join(way)}")
        if _under(module, ("client_app",)):
            for name, way in imports.reached(module).items():
                if _under(name, ("fl_app.audit",)) and name not in WRITING:
                    found.append(f"{module} reaches {name} by {' -> '.join(way)}")
            # A name bound to a whole module would reach the reader too.
            whole = imports.modules_named(module) | (imports.direct[module] & {"fl_app.audit"})
            for name in sorted(whole):
                if _under(name, ("fl_app.audit",)):
                    found.append(f"{module} imports the whole of {name}")
    return found


def test_the_wall_holds() -> None:
    assert breaches(ROOT) == []


def test_there_is_something_to_guard() -> None:
    modules = Imports(ROOT).files
    assert "fl_app.audit.truth" in modules
    assert any(_under(module, ("server_strategies.attacks",)) for module in modules)


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("server_strategies/pool.py", "import fl_app.audit.truth", "fl_app.audit"),
        ("server_strategies/pool.py", "from fl_app import audit", "fl_app.audit"),
        ("server_strategies/pool.py", "from fl_app.helper import x", "fl_app.audit"),
        ("server_strategies/attacks/a.py", "def f():\n    import fl_app.audit", "fl_app.audit"),
        ("server_strategies/attacks/a.py", "from ..relay import x", "fl_app.audit"),
        ("server_strategies/attacks/a.py", "from .. import relay", "fl_app.audit"),
        ("server_strategies/attacks/a.py", "from flwr.app import Message", "flwr"),
        ("server_strategies/attacks/a.py", "import ray.util", "ray"),
        ("server_strategies/pool.py", "import_module('client_app.app')", "client_app"),
        ("server_strategies/pool.py", "from fl_app.server_app import app", "fl_app.server_app"),
        ("client_app/app.py", "from fl_app.audit.truth import read_truth", "read_truth"),
        ("client_app/app.py", "from fl_app.audit import metrics", "metrics"),
        ("client_app/app.py", "import fl_app.audit.truth as t", "the whole of"),
        ("client_app/app.py", "from fl_app.audit import truth", "the whole of"),
        ("client_app/app.py", "from fl_app.scores import x", "fl_app.audit.metrics"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, source: str, breach: str) -> None:
    tree = {
        "fl_app/__init__.py": "",
        "fl_app/audit/__init__.py": "",
        "fl_app/audit/truth.py": "",
        "fl_app/helper.py": "def f():\n    from .audit import truth",
        "fl_app/audit/metrics.py": "",
        "fl_app/scores.py": "import fl_app.audit.metrics",
        "client_app/__init__.py": "",
        "client_app/app.py": "from fl_app.audit.truth import Truth, write_truth",
        "server_strategies/__init__.py": "",
        "server_strategies/attacks/__init__.py": "",
    }
    for path, text in tree.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert breaches(tmp_path) == []
    (tmp_path / "server_strategies/relay.py").write_text("import fl_app.audit.truth")
    (tmp_path / file).write_text(source)
    culprit = file.removesuffix(".py").replace("/", ".")
    assert any(found.startswith(culprit) and breach in found for found in breaches(tmp_path))

"""The wall: an attacker's code can't reach what only the auditor may see.

Imports are read from the source, not from a running process, so that one
inside a function counts too. What an attack may not import it may not open, look
up or load by another name either.
"""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.runs import recorded_run
from rich.console import Console

from fl_app.audit.auditor import Auditor
from fl_app.config import load_config
from fl_app.data import dataset_info
from fl_app.runs import attacking
from server_strategies.attack_pool import AttackPool, Job, enqueue

ROOT = Path(__file__).parents[1]
# A client leaves its Truth and never reads one.
WRITING = (
    "fl_app.audit",
    "fl_app.audit.truth",
    "fl_app.audit.truth.Truth",
    "fl_app.audit.truth.write_truth",
)
# What reads files; an attack is a function of tensors.
FILES = (
    "builtins", "datasets", "fl_app.util.files", "flwr_datasets", "glob", "io", "mmap", "os",
    "pathlib", "pickle", "PIL", "runpy", "safetensors", "shutil", "skimage", "socket", "sqlite3",
    "subprocess", "tempfile", "zipfile",
)  # fmt: skip
READS_FILES = {("server_strategies.attacks.accounting", "pathlib")}  # /proc, for the peak memory
# Names by which code reaches a module that it does not import.
ROUNDABOUT = ("__import__", "eval", "exec", "import_module")


class Imports:
    """Which modules of a source tree import what."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, Path] = {}
        # Every folder of code, for whatever lies beside the packages can be imported, too.
        for folder in sorted(path for path in root.iterdir() if next(path.glob("*.py"), None)):
            for file in sorted(folder.rglob("*.py")):
                parts = file.relative_to(root).with_suffix("").parts
                self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        self.direct = {module: frozenset(self._direct(module)) for module in self.files}

    def _nodes(self, module: str) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.files[module].read_text(encoding="utf-8")))

    def modules_named(self, module: str) -> set[str]:
        """Return what a module imports by ``import a.b``, not by ``from``."""
        nodes = (node for node in self._nodes(module) if isinstance(node, ast.Import))
        return {alias.name for node in nodes for alias in node.names}

    def roundabout(self, module: str) -> Iterator[str]:
        """Yield how a module could reach another one, or a file, without importing it."""
        for node in self._nodes(module):
            name = getattr(node, "id", getattr(node, "attr", ""))
            if name in ROUNDABOUT and not (isinstance(node, ast.Attribute) and name == "eval"):
                yield name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                whole = f"{node.value.id}.{node.attr}"
                if whole in ("sys.modules", "torch.load", "np.load", "np.fromfile", "np.memmap"):
                    yield whole
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "open":
                yield "open"

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
            # Only a prior is trained on images; those of the run are the clients'.
            if not _under(module, ("server_strategies.priors",)):
                forbidden += ("fl_app.data",)
            around = {*imports.roundabout(module)}
            around |= {name for name in imports.direct[module] if _under(name, ("importlib",))}
            if not _under(module, ("server_strategies.attacks",)):
                around -= {"open", "torch.load", "np.load"}  # others may read files
            found += [f"{module} uses {name}" for name in sorted(around)]
        if _under(module, ("server_strategies.attacks",)):
            forbidden += ("flwr", "ray")
            for name in sorted(imports.direct[module]):
                if _under(name, FILES) and (module, name.split(".")[0]) not in READS_FILES:
                    found.append(f"{module} imports {name}")
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
    assert {"fl_app.audit.truth", "fl_app.audit.baselines", "fl_app.audit.comparison"} <= set(
        modules
    )
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
        ("server_strategies/pool.py", "import_module('.truth', 'fl_app.audit')", "import_module"),
        ("server_strategies/pool.py", "from importlib import import_module as f", "importlib"),
        ("server_strategies/pool.py", "import sys\nsys.modules['a'].read_truth", "sys.modules"),
        ("server_strategies/pool.py", "from fl_app.data import load_split", "fl_app.data"),
        ("server_strategies/attacks/a.py", "from fl_app.lines import x", "fl_app.audit.baselines"),
        ("server_strategies/attacks/a.py", "from examples.e import x", "fl_app.audit.truth"),
        ("server_strategies/attacks/a.py", "from fl_app.data import load_split", "fl_app.data"),
        ("server_strategies/attacks/a.py", "f = lambda p: open(p).read()", "open"),
        ("server_strategies/attacks/a.py", "from pathlib import Path", "pathlib"),
        (
            "server_strategies/attacks/a.py",
            "from safetensors.torch import load_file",
            "safetensors",
        ),
        ("server_strategies/attacks/a.py", "import torch\ntorch.load('truth')", "torch.load"),
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
        "fl_app/audit/baselines.py": "",
        "fl_app/lines.py": "from fl_app.audit import baselines",
        "fl_app/data/__init__.py": "",
        "examples/e.py": "from fl_app.audit.truth import read_truth",
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


def test_a_worker_is_given_no_private_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config({"overrides": f"runs_dir={tmp_path} client.local_steps=2"})
    folder, observation, truth = recorded_run(config)
    auditor = Auditor(folder, config, config.knowledge(dataset_info(config.dataset)))
    enqueue(folder, Job(observation, auditor.knowledge, config.attack, config.prior, config.seed))
    given: list[bytes] = []
    monkeypatch.setattr(AttackPool, "take", lambda self, job: given.append(pickle.dumps(job)))
    attacking.finish_attacks(auditor, Console(quiet=True))
    forms = [truth.images, (255 * truth.images).round().to(torch.uint8)]
    private = [image.numpy().tobytes() for form in forms for image in form]
    assert private[0] in pickle.dumps(truth.images.numpy())  # it would be found
    assert len(given) == 1 and not any(image in given[0] for image in private)

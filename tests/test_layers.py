"""Imports run one way, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flowleak", "fl_app", "client_app", "server_strategies")
SHARED = ("protocol", "config", "data", "models", "registry", "util")
# What may import what else of the project; a room that is not named may import anything below.
ALLOWED = {
    "fl_app.util": ("fl_app.util",),
    "fl_app.protocol": ("fl_app.protocol", "fl_app.util"),
    "fl_app.registry": ("fl_app.util",),
    "fl_app.config": ("fl_app.protocol", "fl_app.registry", "fl_app.util"),
    **{
        f"fl_app.{room}": tuple(f"fl_app.{below}" for below in SHARED)
        for room in ("data", "models")
    },
    "server_strategies": ("server_strategies", *(f"fl_app.{room}" for room in SHARED)),
    "client_app": ("client_app", "fl_app.audit.truth", *(f"fl_app.{room}" for room in SHARED)),
}


def _modules() -> dict[str, Path]:
    files = {file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def _imports(file: Path, everywhere: bool) -> Iterator[str]:
    """Yield what a file imports when it is imported; also later, inside functions, if asked."""
    queue: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not typing and (everywhere or not inside):
            queue += ast.iter_child_nodes(node)


MODULES = _modules()


def _under(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def test_every_package_is_typed_for_its_users() -> None:
    # `flowleak` re-exports: without the others' marker a type checker sees Any for all of it.
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {
        # A name from the module's own package is a module beside it, not the package.
        name: {i for i in _imports(file, False) if i in MODULES and not _under(name, (i,))}
        for name, file in MODULES.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imported in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, file in MODULES.items()
        if _under(name, (room,))
        for imported in _imports(file, True)
        if imported in MODULES and not _under(imported, ALLOWED[room])
    ]
    # The parts of a name that is allowed are packages, which are empty.
    packages = {".".join(top.split(".")[:-1]) for top in ALLOWED[room]} | {"fl_app"}
    assert [line for line in wrong if line.rpartition(" ")[2] not in packages] == []

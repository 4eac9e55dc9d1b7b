"""What a figure was made by: the version, the code that decides it, and the prior's weights."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from fl_app.util.origin import ROOT

UNKNOWN = "unknown"
"""Of rows that were kept before they said what made them."""

DECIDING = (
    "client_app/defended_steps.py",
    "client_app/defenses.py",
    "client_app/training.py",
    "fl_app/benchmarks/alignment.py",
    "fl_app/benchmarks/assumptions.py",
    "fl_app/benchmarks/case.py",
    "fl_app/benchmarks/clients.py",
    "fl_app/benchmarks/diagnosis.py",
    "fl_app/benchmarks/federation.py",
    "fl_app/benchmarks/labels.py",
    "fl_app/benchmarks/states.py",
    "fl_app/benchmarks/trial.py",
    "fl_app/models",
    "fl_app/protocol",
    "server_strategies/attacks",
    "server_strategies/priors",
    "server_strategies/updates.py",
)
"""Files and folders of the code that decides a benchmark's figures."""

_DIGITS = 12  # of a hash
_LINE = re.compile(r"^Version (.+); code (.+); prior (.+); trials (.+)$", re.MULTILINE)
_CODE = re.compile(rf"\b[0-9a-f]{{{_DIGITS}}}\b|\b{UNKNOWN}\b")


@dataclass(frozen=True)
class Provenance:
    """What the rows of a table were made by; where they differ, in words with their counts.

    Attributes
    ----------
    version : str
        Of flowleak.
    code : str
        See `code_hash`.
    prior : str
        See `short_hash`; ``none`` where the attacks need none.
    trials : str
        Of the case that has the most of them.
    """

    version: str
    code: str
    prior: str
    trials: str

    @classmethod
    def read(cls, text: str) -> Provenance | None:
        """Return what a table says in its `line`; None: nothing."""
        found = _LINE.search(text)
        return cls(*found.groups()) if found else None

    @property
    def line(self) -> str:
        """The line of a table that says it."""
        return f"Version {self.version}; code {self.code}; prior {self.prior}; trials {self.trials}"

    @property
    def age(self) -> str:
        """Whether the code that runs is that of the rows, in words."""
        codes = set(_CODE.findall(self.code))
        if codes == {UNKNOWN}:
            return "code unknown"
        if codes == {code_hash()}:
            return "of this code"
        return "in part of this code" if code_hash() in codes else "of older code"


def version() -> str:
    """Return flowleak's version."""
    return metadata.version("flowleak")


def short_hash(digest: str | None) -> str:
    """Return the first digits of a hash, `UNKNOWN` where there is none."""
    return digest[:_DIGITS] if digest else UNKNOWN


@cache
def code_hash() -> str:
    """Return the hash of the `DECIDING` code; comments, docstrings and layout do not count."""
    return short_hash(hash_of(_files(ROOT)))


def hash_of(files: Sequence[tuple[str, str]]) -> str:
    """Return the SHA-256 of Python files, by name and source, as far as they are run."""
    digest = hashlib.sha256()
    for name, source in files:
        digest.update(repr((name, _run(ast.parse(source)))).encode())
    return digest.hexdigest()


def _files(root: Path) -> list[tuple[str, str]]:
    return [
        (path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for place in DECIDING
        for path in sorted(_python_files(root / place))
    ]


def _python_files(place: Path) -> Iterator[Path]:
    return place.rglob("*.py") if place.is_dir() else iter([place])


def _run(node: object) -> object:
    """Return what is run of a syntax tree, alike in every version of Python.

    Later versions have further fields, which are empty.
    """
    if isinstance(node, list):
        return [_run(each) for each in node if not _is_text(each)]
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, [(name, _run(value)) for name, value in fields]
    return node


def _is_text(node: object) -> bool:
    """Say whether a statement is a string alone: a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )

"""What can be chosen by name: ours, and what other packages offer by entry points.

A table names everything without importing it, so that listing is quick. A package adds
to one by an entry point of the group ``flowleak.NOUNs``, for example::

    [project.entry-points."flowleak.attacks"]
    noisy = "noisy_attack:NoisyAttack"

Its configuration file, where it has one, is ``conf/attack/noisy.yaml`` in that package.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from fl_app.util.extras import MissingExtraError, extras
from fl_app.util.importing import imported

OURS = "flowleak"


@dataclass(frozen=True)
class Entry:
    """Something that can be chosen.

    Attributes
    ----------
    name : str
        What is typed to choose it.
    target : str
        ``module:attribute``.
    package : str
        The distribution that offers it.
    problem : str
        Why it can't be used; "": nothing is known against it.
    """

    name: str
    target: str
    package: str
    problem: str = ""

    def load(self) -> Any:
        """Import and return it.

        Raises
        ------
        ValueError
            If that fails; the message names the package and why.
        """
        if self.problem:
            raise ValueError(self.problem)
        try:
            with extras() if self.package == OURS else nullcontext():
                return imported(self.target)
        except MissingExtraError:
            raise
        except Exception as error:  # a plug-in may raise anything
            raise ValueError(
                f"{self.name!r} of the package {self.package} can't be loaded from "
                f"{self.target}: {type(error).__name__}: {error}"
            ) from error

    def docstring(self) -> str:
        """Return its docstring, read from the source without importing anything."""
        module, _, attribute = self.target.partition(":")
        file = _source(module)
        return _docstring(ast.parse(file.read_text(encoding="utf-8")), attribute) if file else ""

    def folder(self) -> Path | None:
        """Return the folder of its top-level package, or None where it is a single module."""
        file = _source(self.target.partition(":")[0].partition(".")[0])
        return file.parent if file and file.name == "__init__.py" else None


class Registry(MutableMapping[str, Any]):
    """Names and what they stand for; a value is imported when it is asked for.

    What is set is known to this process alone, as in a notebook: not to attack workers.

    Parameters
    ----------
    noun : str
        What an entry is, for messages; the entry points' group is ``flowleak.NOUNs``.
    built_in : mapping of str to str
        ``module:attribute`` by name.
    kind : str
        ``module:Class``, of which every value is an instance; "": any callable.
    classes : bool
        Whether every value is a subclass of `kind` instead.
    """

    def __init__(
        self, noun: str, built_in: Mapping[str, str], kind: str = "", classes: bool = False
    ) -> None:
        self.noun, self._built_in, self._kind, self._classes = noun, built_in, kind, classes
        self.group = f"flowleak.{noun}s"
        self._loaded: dict[str, Any] = {}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every entry by name, ours first. One that two packages offer can't be used."""
        found = {name: Entry(name, target, OURS) for name, target in self._built_in.items()}
        points = metadata.entry_points(group=self.group)
        for point in sorted(points, key=lambda point: point.name):
            package = point.dist.name if point.dist else "?"
            entry = Entry(point.name, point.value, package)
            other = found.setdefault(point.name, entry)
            if other != entry and not other.problem:
                problem = (
                    f"the {self.noun} {point.name!r} is offered by two packages: {other.package} "
                    f"and {package}; uninstall one of them"
                )
                found[point.name] = replace(other, problem=problem)
        return found

    def __getitem__(self, name: str) -> Any:
        """Import and return an entry.

        Raises
        ------
        KeyError
            If there is none of this name; the message says which there are.
        ValueError
            If it can't be imported, or is not of the registry's kind.
        """
        if name not in self._loaded:
            entry = self.entries.get(name)
            if entry is None:
                raise KeyError(self.unknown(name))
            found = entry.load()
            self._check(entry, found)
            self._loaded[name] = found
        return self._loaded[name]

    def __setitem__(self, name: str, value: Any) -> None:
        entry = self.entries.get(name, Entry(name, "", "this process"))
        self._check(entry, value)
        self.entries[name], self._loaded[name] = entry, value

    def __delitem__(self, name: str) -> None:
        del self.entries[name]
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def unknown(self, name: str) -> str:
        """Return what is wrong with a name that is not there, in words."""
        return f"{self.noun} is {name!r}; allowed: {', '.join(sorted(self.entries))}"

    def _check(self, entry: Entry, found: Any) -> None:
        if not self._kind:
            right, wanted = callable(found), "something that can be called"
        else:
            kind = Entry(self.noun, self._kind, OURS).load()
            right = isinstance(found, kind)
            if self._classes:
                right = isinstance(found, type) and issubclass(found, kind)
            wanted = f"{'a subclass' if self._classes else 'an instance'} of {kind.__name__}"
        if not right:
            raise ValueError(
                f"the {self.noun} {entry.name!r} of the package {entry.package} is {found!r}; "
                f"allowed: {wanted}"
            )


def _source(module: str) -> Path | None:
    """Return a module's source file, without importing it or its packages; None: no such file."""
    places: list[str] | None = None
    origin = ""
    parts = module.split(".")
    for depth in range(len(parts) if module else 0):
        name = ".".join(parts[: depth + 1])
        specs = (finder.find_spec(name, places) for finder in sys.meta_path)
        spec = next((found for found in specs if found), None)
        if spec is None or not spec.origin:
            return None
        origin, places = spec.origin, list(spec.submodule_search_locations or [])
    file = Path(origin or ".")
    return file if file.suffix == ".py" and file.is_file() else None


def _docstring(tree: ast.Module, name: str) -> str:
    """Return the docstring of a class, a function, or a name with a string below it."""
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return ""


ATTACKS = Registry(
    "attack",
    {
        "flow_matching": "server_strategies.attacks.flow_matching:FlowMatching",
        "flow_matching_paper": "server_strategies.attacks.flow_matching_paper:FlowMatchingPaper",
        "sme": "server_strategies.attacks.sme:SME",
        "dlf": "server_strategies.attacks.dlf:DLF",
        "ggl": "server_strategies.attacks.ggl:GGL",
        "gradinversion": "server_strategies.attacks.gradinversion:GradInversion",
        "inverting_gradients": "server_strategies.attacks.inverting_gradients:InvertingGradients",
        "idlg": "server_strategies.attacks.idlg:IDLG",
        "dlg": "server_strategies.attacks.dlg:DLG",
        "dropout_inversion": "server_strategies.attacks.dropout_inversion:DropoutInversion",
        "feature_regression": "server_strategies.attacks.feature_regression:FeatureRegression",
    },
    "server_strategies.attacks.attack:Attack",
    classes=True,
)
"""Attacks: subclasses of `Attack`."""

MODELS = Registry(
    "model",
    {
        "convnet": "fl_app.models.convnet:CONVNET",
        "lenet5": "fl_app.models.lenet:LENET5",
        "mlp": "fl_app.models.mlp:MLP_FAMILY",
        "mlp_mixer": "fl_app.models.mlp_mixer:MLP_MIXER",
        "resnet8": "fl_app.models.resnet:RESNET8",
        "resnet8_wide": "fl_app.models.resnet:RESNET8_WIDE",
        "resnet18": "fl_app.models.resnet:RESNET18",
        "vgg11": "fl_app.models.vgg:VGG11_FAMILY",
        "vit_tiny": "fl_app.models.vit:VIT_TINY",
    },
    "fl_app.models.family:Family",
)
"""Models: instances of `Family`."""

PRIORS = Registry(
    "prior",
    {
        "compact": "server_strategies.priors.shipped:compact",
        "unet64": "server_strategies.priors.shipped:unet64",
    },
)
"""Priors: functions of a torch device that return a velocity network, see `load_flow`."""

DEFENSES = Registry("defense", {})
"""Defences beside those of `Defense`: functions ``(update, generator)`` that return the update
which is sent, a mapping of str to Tensor as they are given."""

_HUB = "fl_app.data.hub:SOURCE"
DATASETS = Registry(
    "dataset",
    {
        "photos": "fl_app.data.photos:SOURCE",
        "cifar10": _HUB,
        "cifar100": _HUB,
        "tiny_imagenet": _HUB,
        "mnist": _HUB,
        "fashion_mnist": _HUB,
        "imagefolder": "fl_app.data.imagefolder:SOURCE",
    },
    "fl_app.data.base:Source",
)
"""Data sets: instances of `Source`."""

BENCHMARKS = Registry(
    "benchmark",
    {
        "quick": "fl_app.benchmarks.quick:SUITE",
        "matching": "fl_app.benchmarks.matching:SUITE",
        "speed": "fl_app.benchmarks.speed:SUITE",
        "headline": "fl_app.benchmarks.headline:SUITE",
        "examples": "fl_app.benchmarks.examples:SUITE",
        "honest": "fl_app.benchmarks.honest:SUITE",
        "states": "fl_app.benchmarks.figure_4:SUITE",
        "exact": "fl_app.benchmarks.exact:SUITE",
        "exact-grey": "fl_app.benchmarks.exact_grey:SUITE",
        "constants": "fl_app.benchmarks.constants:SUITE",
        "prior": "fl_app.benchmarks.prior:SUITE",
        "models": "fl_app.benchmarks.models:SUITE",
        "regression": "fl_app.benchmarks.regression:SUITE",
        "closed-form": "fl_app.benchmarks.closed_form:SUITE",
        "batch-sizes": "fl_app.benchmarks.batch_sizes:SUITE",
        "tiny-imagenet": "fl_app.benchmarks.tiny_imagenet:SUITE",
        "family": "fl_app.benchmarks.family:SUITE",
        "defenses": "fl_app.benchmarks.defenses:SUITE",
        "labels": "fl_app.benchmarks.labels:SUITE",
        "alignment": "fl_app.benchmarks.alignment:SUITE",
        "diagnosis": "fl_app.benchmarks.diagnosis:SUITE",
    },
    "fl_app.benchmarks.suite:Suite",
)
"""Benchmarks: instances of `Suite`, see `flowleak bench`."""

REGISTRIES = {
    registry.group.partition(".")[2]: registry
    for registry in (ATTACKS, MODELS, PRIORS, DEFENSES, DATASETS, BENCHMARKS)
}
"""Every registry by its plural, as `flowleak list` takes it."""

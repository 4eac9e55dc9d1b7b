"""conf/ and the run config, merged into one typed and validated Config.

Later wins: conf/config.yaml, the chosen groups' files, an experiment's file,
then the free dotlist `overrides`. Unknown keys, wrong types and values out of
range are refused with the key, the value and what is allowed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from fl_app.protocol import DatasetInfo, Defense, Knowledge, LocalTraining
from fl_app.registry import DATASETS, OURS, REGISTRIES, Registry
from fl_app.util.files import RUNS_DIR, project_file

UNBOUNDED = 1_000_000
"""Iterations that no attack makes in its seconds."""

GROUPS = ("dataset", "model", "client", "defense", "attack", "prior")
# The groups that plug-ins add to, and the key that names one there.
_KEYS = {
    "dataset": "name", "model": "name", "attack": "name", "defense": "custom", "prior": "weights",
}  # fmt: skip


class ConfigError(ValueError):
    """A setting that can't be used; the message names the key, the value and what is allowed."""


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError, with the name and what is allowed, for a value below `low`."""
    if not value >= low:
        raise ValueError(f"{name} is {value}; allowed: {low} or more")


@dataclass(frozen=True)
class DatasetConfig:
    """Which images the clients hold, and how they are split among them."""

    name: str = "photos"
    source: str = ""
    partitioner: str = "iid"
    dirichlet_alpha: float = 0.5

    def __post_init__(self) -> None:
        _one_of("name", self.name, tuple(DATASETS))
        _one_of("partitioner", self.partitioner, ("iid", "dirichlet"))
        if not 0 < self.dirichlet_alpha < math.inf:
            raise ValueError(f"dirichlet_alpha is {self.dirichlet_alpha}; allowed: more than 0")
        if self.name == "imagefolder" and not self.source:
            raise ValueError("source is empty; allowed for imagefolder: a folder's path")


@dataclass(frozen=True)
class ModelConfig:
    """The model that the federation trains, and its normalisation layers."""

    name: str = "convnet"
    norm: str = ""


@dataclass(frozen=True)
class AttackConfig:
    """Which attack runs on a watched update, and what it may spend."""

    name: str = "flow_matching"
    iterations: int = 200
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("iterations", self.iterations, 1)
        at_least("seconds", self.seconds, 0)


@dataclass(frozen=True)
class PriorConfig:
    """The learned prior that attacks may use."""

    weights: str = "compact"


@dataclass(frozen=True)
class WatchConfig:
    """Which updates the server copies."""

    clients: Any = "all"
    rounds: list[int] = field(default_factory=list)
    every: int = 0

    def __post_init__(self) -> None:
        clients = self.clients
        share = type(clients) is float and 0 < clients <= 1
        ids = isinstance(clients, list) and all(type(c) is int and c >= 0 for c in clients)
        if not (clients == "all" or share or (ids and clients)):
            hint = f"; [{clients}] is one client" if type(clients) is int else ""
            raise ValueError(
                f"clients is {clients!r}; allowed: all, a share in (0, 1] with its point, as 1.0, "
                f"or a list of ids{hint}"
            )
        if any(round_ < 1 for round_ in self.rounds):
            raise ValueError(f"rounds is {self.rounds}; allowed: numbers from 1, or [] for every")
        at_least("every", self.every, 0)

    def check(self, rounds: int) -> None:
        """Raise ValueError, with what is allowed, where a run has no such rounds.

        Parameters
        ----------
        rounds : int
            Of the run.
        """
        beyond = [round_ for round_ in self.rounds if round_ > rounds]
        if beyond:
            raise ValueError(
                f"rounds holds {beyond[0]}; allowed with rounds={rounds}: 1 to {rounds}"
            )
        if not self.rounds and self.every > rounds:
            raise ValueError(
                f"every is {self.every}, and no such round is in rounds={rounds}; "
                f"allowed without watch.rounds: 0 to {rounds}"
            )

    def watches(self, round_: int) -> bool:
        """Return whether a round, from 1, is watched: it is listed, or is the `every`-th.

        Where nothing is listed and `every` is 0, every round is.
        """
        if not self.rounds and not self.every:
            return True
        return round_ in self.rounds or bool(self.every and round_ % self.every == 0)


@dataclass(frozen=True)
class AuditConfig:
    """What the auditor may know and needs."""

    truth: bool | None = None
    labels: str = "given"
    training: str = "given"
    defense: str = "given"
    lpips_weights: str = ""

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, ("given", "unknown"))
        _one_of("training", self.training, ("given", "unknown"))
        _one_of("defense", self.defense, ("given", "unknown"))
        if self.labels == "given" and self.truth is False:
            raise ValueError("labels is 'given'; allowed without truth: unknown")


@dataclass(frozen=True)
class PoolConfig:
    """The workers that run attacks."""

    workers: int = 0
    retries: int = 1

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 0)
        at_least("retries", self.retries, 0)


@dataclass(frozen=True)
class StrategyConfig:
    """The Flower strategy that the curious server runs honestly."""

    name: str = "fedavg"
    fraction_evaluate: float = 0.5
    max_examples: int = 100_000

    def __post_init__(self) -> None:
        _one_of("name", self.name, ("fedavg", "fedadam"))
        at_least("max_examples", self.max_examples, 1)
        if not 0 <= self.fraction_evaluate <= 1:
            raise ValueError(f"fraction_evaluate is {self.fraction_evaluate}; allowed: 0 to 1")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; see conf/config.yaml for each default's why."""

    name: str = "audit"
    runs_dir: str = RUNS_DIR
    seed: int = 0
    rounds: int = 2
    start_from: str = ""
    checkpoints: int = 20
    num_clients: int = 4
    watch: WatchConfig = field(default_factory=WatchConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    client: LocalTraining = field(default_factory=LocalTraining)
    defense: Defense = field(default_factory=Defense)
    attack: AttackConfig = field(default_factory=AttackConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)
        at_least("checkpoints", self.checkpoints, 1)
        at_least("num_clients", self.num_clients, 1)
        at_least("seed", self.seed, 0)
        try:
            self.watch.check(self.rounds)
        except ValueError as error:
            raise ValueError(f"watch.{error}") from error
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}; allowed: a folder's name, no path")

    @property
    def most_examples(self) -> int:
        """Images that a client can train on in a round: K B; of whole epochs, what is agreed."""
        steps = self.client.local_steps * self.client.batch_size
        return steps or self.strategy.max_examples

    def settled(self, simulated: bool) -> Config:
        """Return the configuration with what depends on where it runs decided.

        Truth is on in a simulation and off in a deployment where it is not set;
        without it the labels are unknown.
        """
        if self.audit.truth is not None:
            return self
        labels = self.audit.labels if simulated else "unknown"
        return replace(self, audit=replace(self.audit, truth=simulated, labels=labels))

    def knowledge(self, info: DatasetInfo) -> Knowledge:
        """Return what the server knows of every client, the data's facts included; no labels."""
        return Knowledge(
            model=self.model.name,
            num_classes=info.num_classes,
            image_shape=info.image_shape,
            mean=info.mean,
            std=info.std,
            training=self.client if self.audit.training == "given" else None,
            defense=self.defense.plain() if self.audit.defense == "given" else Defense(),
            norm=self.model.norm,
            precode=self.defense.precode,
            dropout=self.defense.dropout,
        )


def load_config(run_config: Mapping[str, Any] | None = None) -> Config:
    """Merge conf/ with a run config.

    Parameters
    ----------
    run_config : mapping, optional
        Any of: a group's name (``dataset``, ``model``, ``client``, ``defense``,
        ``attack``, ``prior``), ``experiment``, and ``overrides``, a dotlist such as
        ``"client.lr=0.01 rounds=3"``. An empty string is the default.

    Raises
    ------
    ConfigError
        If a key is unknown, or a value has the wrong type or is out of range.
    """
    chosen = {key: value for key, value in dict(run_config or {}).items() if value != ""}
    unknown = set(chosen) - {*GROUPS, "experiment", "overrides"}
    if unknown:
        raise ConfigError(
            f"unknown run-config key {sorted(unknown)[0]!r}; "
            f"allowed: {', '.join((*GROUPS, 'experiment', 'overrides'))}"
        )
    for key, value in chosen.items():
        if not isinstance(value, str):
            raise ConfigError(f"run-config key {key} is {value!r}; allowed: a string")
    defaults = OmegaConf.load(project_file("conf/config.yaml"))
    assert isinstance(defaults, DictConfig)
    groups = {**defaults.pop("groups")}
    experiment = DictConfig({})
    if "experiment" in chosen:
        experiment = _read("experiment", chosen["experiment"])
        groups.update(experiment.pop("groups", {}))
    groups.update({key: chosen[key] for key in GROUPS if key in chosen})
    layers: list[tuple[str, Any]] = [("conf/config.yaml", defaults)]
    layers += [(f"conf/{group}/{groups[group]}.yaml", {group: _read(group, groups[group])})
               for group in GROUPS]  # fmt: skip
    layers += [("experiment", experiment)]
    try:
        dotlist = shlex.split(chosen.get("overrides", ""))
        for item in dotlist:
            if "=" not in item:
                raise ConfigError(f"overrides holds {item!r}; allowed: key=value pairs")
        layers += [("overrides", OmegaConf.from_dotlist(dotlist))]
    except ValueError as error:
        raise ConfigError(f"overrides can't be read: {error}") from error
    return _merge(layers)


def config_files(group: str) -> dict[str, Path]:
    """Return the configuration files of a group by name: ours, and those of plug-ins.

    A plug-in's lie in ``conf/GROUP/`` of the package that holds it, see `fl_app.registry`.

    Parameters
    ----------
    group : str
        One of `GROUPS`, or ``experiment``.
    """
    folders = [project_file(f"conf/{group}")]
    for entry in _registry(group).entries.values() if group in _KEYS else ():
        package = entry.folder() if entry.package != OURS else None
        folders += [package / "conf" / group] if package else []
    files = (file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml")))
    return {file.stem: file for file in files}


def choices(group: str) -> list[str]:
    """Return what a group's key in the run config takes: its files, and plug-ins without one."""
    plug_ins = _registry(group).entries if group in _KEYS else ()
    return sorted({*config_files(group), *plug_ins})


def _registry(group: str) -> Registry:
    return REGISTRIES[f"{group}s"]


def _read(group: str, name: str) -> DictConfig:
    """Read one file of a group, or the defaults of a plug-in that has none."""
    files = config_files(group)
    if name in files:
        loaded = OmegaConf.load(files[name])
        assert isinstance(loaded, DictConfig)
        return loaded
    if name in choices(group):
        return DictConfig({_KEYS[group]: name})
    raise ConfigError(f"{group} is {name!r}; allowed: {', '.join(choices(group)) or 'none yet'}")


def _unlock(node: Any) -> None:
    """OmegaConf makes frozen dataclasses read-only; merging needs them writable."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_dict(child):
            _unlock(child)


def _refuse_interpolation(origin: str, layer: Any, key: str = "") -> None:
    """Refuse ``${...}``: OmegaConf would read the environment and other keys for it.

    A run's configuration may come from anybody.
    """
    if OmegaConf.is_config(layer):
        layer = OmegaConf.to_container(layer, resolve=False)
    if isinstance(layer, str) and "${" in layer:
        raise ConfigError(f"{key} (from {origin}) is {layer!r}; allowed: text without ${{")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(layer, Mapping):
        items = layer.items()
    elif isinstance(layer, list | tuple):
        items = enumerate(layer)
    for name, value in items:
        _refuse_interpolation(origin, name, f"{key}.{name}".lstrip("."))
        _refuse_interpolation(origin, value, f"{key}.{name}".lstrip("."))


def _merge(layers: list[tuple[str, Any]]) -> Config:
    merged: Any = OmegaConf.structured(Config)
    _unlock(merged)
    for origin, layer in layers:
        _refuse_interpolation(origin, layer)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            where = error.full_key or "?"
            message = (error.msg or "").splitlines()[0]
            if isinstance(error, ConfigKeyError):
                parent = (
                    OmegaConf.select(merged, where.rpartition(".")[0]) if "." in where else None
                )
                message = f"unknown key; allowed: {', '.join(sorted(parent or merged))}"
            raise ConfigError(f"{where} (from {origin}): {message}") from error
    # Check section by section, so that an error can name the section.
    for section in merged:
        if OmegaConf.is_dict(merged._get_node(section)):
            try:
                OmegaConf.to_object(merged[section])
            except ValueError as error:
                raise ConfigError(f"{section}.{error}") from error
    try:
        config = OmegaConf.to_object(merged)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config, extra: Mapping[str, Any] | None = None) -> str:
    """Return the resolved configuration as YAML, with `extra` top-level entries before it."""
    return OmegaConf.to_yaml(OmegaConf.create({**(extra or {}), **asdict(config)}))


def from_yaml(path: Path) -> Config:
    """Read back a run's resolved configuration (its extra entries are left out).

    Raises
    ------
    ConfigError
        If the file is missing or is no configuration of this version.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; is {path.parent} a run's folder?")
    loaded = plain_yaml(path)
    known = set(Config.__dataclass_fields__)
    return _merge([(str(path), {key: loaded[key] for key in loaded if key in known})])


def plain_yaml(path: Path) -> dict[str, Any]:
    """Return a file's mapping as it is written: ``${...}`` in it is text, and nothing is run."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(loaded, dict)
    return loaded

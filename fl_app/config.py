"""conf/ and the run config, merged into one typed and validated Config.

Later wins: conf/config.yaml, the chosen groups' files, an experiment's file,
then the free dotlist `overrides`. Unknown keys, wrong types and values out of
range are refused with the key, the value and what is allowed.
"""

from __future__ import annotations

import io
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from fl_app.protocol import LABEL_LEVELS, DatasetInfo, Defense, Knowledge, LocalTraining
from fl_app.registry import DATASETS, OURS, REGISTRIES, Registry
from fl_app.util.files import RUNS_DIR, project_file
from fl_app.util.reading import BrokenFileError, read_text
from fl_app.util.text import printable

UNBOUNDED = 1_000_000
"""Iterations that no attack makes in its seconds."""

GROUPS = ("dataset", "model", "client", "defense", "attack", "prior")
# The groups that plug-ins add to, and the key that names one there.
_KEYS = {
    "dataset": "name", "model": "name", "attack": "name", "defense": "custom", "prior": "weights",
}  # fmt: skip
# What every run's config.yaml has, of whatever version; the last one is written last.
_ALWAYS = ("name", "seed", "rounds", "watch", "audit", *GROUPS)

HUB = "hub:"
"""Begins a prior's weights on the Hugging Face hub: ``hub:OWNER/NAME``."""
LAST_SEED = 2**32 - 1
"""The largest seed that every library takes."""

_DEEPEST = 20  # levels of YAML
_MOST_BYTES = 2**20  # of a file of settings
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ConfigError(ValueError):
    """A setting that can't be used; the message names the key, the value and what is allowed."""


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError, with the name and what is allowed, for a value below `low`."""
    if not value >= low:
        raise ValueError(f"{name} is {value}; allowed: {low} or more")


def check_seed(name: str, value: int) -> None:
    """Raise ValueError for a seed that not every library takes."""
    if not 0 <= value <= LAST_SEED:
        raise ValueError(f"{name} is {value}; allowed: 0 to {LAST_SEED}")


@dataclass(frozen=True)
class DatasetConfig:
    """Which images the clients hold, and how they are split among them.

    `split` is ``train``, or ``test``: half of the test images, and the others evaluate.
    """

    name: str = "photos"
    source: str = ""
    split: str = "train"
    partitioner: str = "iid"
    dirichlet_alpha: float = 0.5

    def __post_init__(self) -> None:
        _one_of("name", self.name, tuple(DATASETS))
        _one_of("split", self.split, ("train", "test"))
        _one_of("partitioner", self.partitioner, ("iid", "dirichlet"))
        if not 0 < self.dirichlet_alpha < math.inf:
            raise ValueError(f"dirichlet_alpha is {self.dirichlet_alpha}; allowed: more than 0")
        if self.name == "imagefolder" and not self.source:
            raise ValueError("source is empty; allowed for imagefolder: a folder's path")


@dataclass(frozen=True)
class ModelConfig:
    """The model that the federation trains, its normalisation layers and its head."""

    name: str = "convnet"
    norm: str = ""
    head: str = ""


@dataclass(frozen=True)
class AttackConfig:
    """Which attack runs on a watched update, and what it may spend."""

    name: str = "flow_matching"
    iterations: int = 200
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    recovery_threshold: float = 0.0

    def __post_init__(self) -> None:
        at_least("iterations", self.iterations, 1)
        at_least("seconds", self.seconds, 0)
        at_least("recovery_threshold", self.recovery_threshold, 0)


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
    labels: str = "counts"
    training: str = "given"
    defense: str = "given"
    lpips_weights: str = ""
    on_line: str = ""

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, LABEL_LEVELS)
        _one_of("training", self.training, ("given", "unknown"))
        _one_of("defense", self.defense, ("given", "unknown"))
        if not re.fullmatch(r"(\w+(\.\w+)*:\w+)?", self.on_line):
            raise ValueError(f"on_line is {self.on_line!r}; allowed: module:function")
        if self.labels != "unknown" and self.truth is False:
            raise ValueError(f"labels is {self.labels!r}; allowed without truth: unknown")


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
        check_seed("seed", self.seed)
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
            head=self.model.head,
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
    defaults = read_settings(project_file("conf/config.yaml"))
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
    layers += [("overrides", _overrides(chosen.get("overrides", "")))]
    return _merge(layers)


def _overrides(text: str) -> dict[str, Any]:
    """Return what a dotlist sets, as nested dicts: words as they are typed, the rest as YAML."""
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        items = list(words)
    except ValueError as error:
        raise ConfigError(f"overrides can't be read: {error}") from error
    found: dict[str, Any] = {}
    for item in items:
        key, equals, typed = item.partition("=")
        if not equals:
            raise ConfigError(f"overrides holds {item!r}; allowed: key=value pairs")
        section = found
        *parents, last = key.split(".")
        value = _typed_value(key, typed)
        for parent in parents:
            section = section.setdefault(parent, {})
        # A section as a whole, and then one of its keys: both count.
        both = isinstance(value, dict) and isinstance(section.get(last), dict)
        section[last] = {**section[last], **value} if both else value
    return found


def _typed_value(key: str, typed: str) -> Any:
    """Return the value that was typed for a key.

    Raises
    ------
    ConfigError
        If there is no such key, or the value can't be one of it.
    """
    kind = _kind(key)
    if kind is str:  # YAML would read 010 as 8, and 12:3 as 723
        return typed
    if kind is int and re.fullmatch(r"[+-]?[0-9]{1,100}", typed):
        return int(typed)
    if kind is float and re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", typed):
        try:
            return float(typed)
        except ValueError:
            return typed  # refused with the others of the wrong type
    # As OmegaConf reads a dotlist.
    what = f"overrides holds {key}={typed}, which"
    value = _read_yaml(typed, lambda text: OmegaConf.from_dotlist([f"value={text}"]), what)["value"]
    if not is_dataclass(kind) or isinstance(value, dict):
        return value
    hint = f"{key}.NAME=VALUE; its names: {', '.join(get_type_hints(kind))}"
    if key in GROUPS:
        hint = f"-c '{key}=\"{typed}\"' beside overrides, or {hint}"
    raise ConfigError(f"overrides holds {key}={typed}, but {key} is a group; allowed: {hint}")


def _kind(key: str) -> Any:
    """Return the type of a setting by its key with dots."""
    if "[" in key:
        whole = key.partition("[")[0]
        raise ConfigError(f"overrides sets {key}; allowed: a whole list, as {whole}=[1,3]")
    kind: Any = Config
    where: list[str] = []
    for part in key.split("."):
        if get_origin(kind) is dict or kind is Any:
            if not part or where == ["watch", "clients"]:
                raise ConfigError(f"{key} (from overrides): {'.'.join(where)} has no such part")
            kind = Any
        elif is_dataclass(kind):
            names = get_type_hints(kind)
            if part not in names:
                allowed = ", ".join(sorted(names))
                raise ConfigError(f"{key} (from overrides): unknown key; allowed: {allowed}")
            kind = names[part]
        else:
            raise ConfigError(f"{key} (from overrides): {'.'.join(where)} has no such part")
        where.append(part)
    return kind


def _read_yaml(text: str, load: Callable[[str], Any], what: str) -> Any:
    """Return what YAML says, in plain Python.

    Parameters
    ----------
    text : str
    load : callable
        OmegaConf's way to read it.
    what : str
        Names it, for the error.

    Raises
    ------
    ConfigError
        If it can't be read, refers to itself, or is nested too deeply.
    """
    levels = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            levels += isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent)
            levels -= isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent)
            if levels > _DEEPEST:
                raise ConfigError(f"{what} is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{what} holds an alias, *{event.anchor}; write it out")
        return OmegaConf.to_container(load(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, TypeError) as error:
        raise ConfigError(
            f"{what} is no YAML: {printable(' '.join(str(error).split()))}"
        ) from error


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
    """Read one file of a group, or the defaults of a plug-in, or a prior, that has none."""
    files = config_files(group)
    if name in files:
        return DictConfig(read_settings(files[name]))
    if name in choices(group) or (group == "prior" and name.startswith(HUB)):
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
    # OmegaConf merges no mapping into an empty tuple, and takes both into nothing.
    OmegaConf.set_struct(merged.client, False)
    merged.client.pop("optimizer_options")
    merged.client.optimizer_options = None
    OmegaConf.set_struct(merged.client, None)
    for origin, layer in layers:
        _refuse_interpolation(origin, layer)
        try:
            merged.merge_with(layer)  # OmegaConf.merge copies all of it each time
        except OmegaConfBaseException as error:
            where = error.full_key or "?"
            words = error.msg if error.full_key else ""
            message = (words or "a value where a section should be").splitlines()[0]
            if isinstance(error, ConfigKeyError):
                parent = (
                    OmegaConf.select(merged, where.rpartition(".")[0]) if "." in where else None
                )
                message = f"unknown key; allowed: {', '.join(sorted(parent or merged))}"
            raise ConfigError(f"{where} (from {origin}): {message}") from error
        except (IndexError, TypeError, ValueError) as error:  # a value in a section's place
            raise ConfigError(f"{origin} has a value where a section should be: {error}") from error
    # Check section by section, so that an error can name the section.
    for section in merged:
        if OmegaConf.is_dict(merged._get_node(section)):
            try:
                OmegaConf.to_object(merged[section])
            except (ValueError, OmegaConfBaseException) as error:
                raise ConfigError(f"{section}.{_first_line(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(config, Config)
    for key, number in _numbers(asdict(config)):
        if not math.isfinite(number):
            raise ConfigError(f"{key} is {number}; allowed: a finite number")
    return config


def _first_line(error: Exception) -> str:
    """Return what an error says, without where OmegaConf found it."""
    return printable(str(error).partition("\n")[0])


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers with a point in a setting, each with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, float):
        yield key, value


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
    return from_settings(read_settings(path), path)


def from_settings(settings: Mapping[str, Any], path: Path) -> Config:
    """Return the configuration in a run's settings, as `read_settings` gives them, of a file.

    Raises
    ------
    ConfigError
        If they are no configuration of this version.
    """
    missing = [key for key in _ALWAYS if key not in settings]
    if missing:
        raise ConfigError(f"{path} is no run's configuration: it lacks {', '.join(missing)}")
    known = set(Config.__dataclass_fields__)
    return _merge([(str(path), {key: settings[key] for key in settings if key in known})])


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a run's or a group's file, unchecked.

    Raises
    ------
    ConfigError
        If the file is missing, can't be read, or holds anything but settings.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except BrokenFileError as error:
        raise ConfigError(str(error)) from error
    settings = _read_yaml(text, lambda text: OmegaConf.load(io.StringIO(text)), str(path))
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{path} holds no settings; needed: KEY: VALUE, one a line")
    return settings

"""What `flowleak bench NAME` runs: a suite of cases, each on trials.

A trial draws fresh images and a fresh model, trains one client as Flower's clients
train, and looks at the update that a server would see. Cases of one client share its
trials, so they are compared in pairs. Rows are kept in a JSON file after every trial,
so a killed benchmark continues where it was.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table

from fl_app.audit.truth import Truth
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import Clients
from fl_app.benchmarks.processes import in_processes
from fl_app.benchmarks.provenance import code_hash, version
from fl_app.benchmarks.results import Results
from fl_app.benchmarks.rows import SUFFIXES, Row
from fl_app.benchmarks.states import trained_state
from fl_app.config import ConfigError, DatasetConfig, PriorConfig, check_seed
from fl_app.data import ImageSet, dataset_info, fingerprint, halves, load_split
from fl_app.protocol import DatasetInfo, Knowledge, Observation
from fl_app.registry import ATTACKS
from fl_app.runs.folder import git_commit
from server_strategies.priors.places import weights_name

_Kept = TypeVar("_Kept", bound=Results)


@dataclass(frozen=True)
class Setting:
    """What a suite is run on: the options of `flowleak bench`. Images are loaded when asked for.

    Attributes
    ----------
    data : DatasetConfig
    split : {"train", "test", "tuning"}
        That clients draw their images from. The data set's test split is two halves: what is
        reported is measured on ``test``, and constants are chosen on ``tuning``.
    trials : int
        Of each case; 0: none, the results are those that `path` holds.
    seed : int
        Of the first trial; see `draw_client`.
    path : Path or None
        JSON file of all rows, compressed where it ends in ``.xz``; an existing one is
        continued. None: nothing is kept.
    workers : int
        See `in_processes`.
    only : str
        Regular expression: only cases in whose name it is found are run.
    prior : PriorConfig
        Of the attacks.
    lpips_weights : str
        See `load_lpips`.
    private : DatasetConfig or None
        Where clients draw their images from instead, so that none of them can be among
        those that a state was trained on.
    updates : Path or None
        Folder to write the clients' updates to, and to read other tools' images of them from,
        see `beside`. None: neither.
    """

    data: DatasetConfig
    split: str = "test"
    trials: int = 8
    seed: int = 0
    path: Path | None = None
    workers: int = 1
    only: str = ""
    prior: PriorConfig = field(default_factory=PriorConfig)
    lpips_weights: str = ""
    private: DatasetConfig | None = None
    updates: Path | None = None

    def __post_init__(self) -> None:
        kept = bool(self.path and self.path.exists())
        if self.trials < (0 if kept else 1):
            raise ConfigError(
                f"trials is {self.trials}; allowed: 1 or more, or 0 where --out holds results"
            )
        if self.path and not self.path.name.endswith(SUFFIXES):
            allowed = " or ".join(f"NAME{suffix}" for suffix in SUFFIXES)
            raise ConfigError(f"out is {str(self.path)!r}; allowed: {allowed}")
        check_seed("seed", self.seed)
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; allowed: 1 or more")

    @cached_property
    def info(self) -> DatasetInfo:
        """The data set's facts."""
        return dataset_info(self.data)

    @cached_property
    def images(self) -> ImageSet:
        """The images that clients draw from.

        Raises
        ------
        ConfigError
            If those of another folder do not fit the data set.
        """
        if self.private is None and self.split in ("test", "tuning"):
            both = load_split(self.data, "test")
            half = halves(both.labels.tolist())[self.split == "test"]
            return ImageSet(both.images[half], both.labels[half])
        if self.private is None:
            return load_split(self.data, self.split)
        theirs = dataset_info(self.private)
        ours = (self.info.num_classes, self.info.image_shape)
        if (theirs.num_classes, theirs.image_shape) != ours:
            raise ConfigError(
                f"private has {theirs.num_classes} classes of {theirs.image_shape}; "
                f"allowed: {self.info.num_classes} of {self.info.image_shape}, as the data set"
            )
        return load_split(self.private, self.split)

    def clients(
        self, cases: Sequence[Case], tell: Callable[[str], None] = lambda line: None
    ) -> Clients:
        """Return what clients are drawn from, with the states that cases start from.

        Parameters
        ----------
        cases : sequence of Case
        tell : callable, optional
            Takes a line for each epoch of a state that is not in the cache and is trained now.
        """
        wanted = {
            (case.model, case.norm, case.head, case.state) for case in cases if case.state != "init"
        }
        states = {kind: trained_state(self.data, *kind, tell) for kind in sorted(wanted)}
        return Clients(self.images, self.info, states)

    @property
    def facts(self) -> dict[str, Any]:
        """What results depend on beside the cases, and what makes them."""
        facts = {"dataset": self.data.name, "split": self.split, "first_seed": self.seed}
        prior = {"prior": self.prior_name} if self.prior_name else {}
        private = {"private": fingerprint(self.private)} if self.private else {}
        made = {"commit": git_commit(), "version": version(), "code": code_hash()}
        return {**facts, **prior, **private, **made}

    @property
    def prior_name(self) -> str:
        """The prior's name, or that of its file; empty for the default."""
        if self.prior == PriorConfig():
            return ""
        return weights_name(self.prior.weights)

    def command(self, name: str, trials: int) -> str:
        """Return the command that makes these results."""
        words = ["flowleak", "bench", name, "--dataset", self.data.name, "--split", self.split]
        words += ["--prior", self.prior_name] if self.prior_name else []
        words += ["--trials", str(trials), "--seed", str(self.seed)]
        words += ["--workers", str(self.workers)] if self.workers > 1 else []
        words += ["--private", self.private.name] if self.private else []
        words += ["--cases", self.only] if self.only else []
        return shlex.join(words)


@dataclass(frozen=True)
class Suite(ABC, Generic[_Kept]):
    """A benchmark. It is sent to worker processes, which import its class.

    Attributes
    ----------
    cases : tuple of Case
        In the order of the table.
    split : str
        Of the images that clients draw from, where none is asked for (`Setting.split`):
        ``tuning`` of a benchmark by which constants are chosen.
    """

    cases: tuple[Case, ...]
    split: str = field(default="test", kw_only=True)

    @abstractmethod
    def results(self, name: str, setting: Setting) -> _Kept:
        """Return the results that `setting.path` holds; none yet where there is no such file."""

    @abstractmethod
    def trial(self, case: Case, seed: int, clients: Clients, setting: Setting) -> list[Row]:
        """Return the rows of one trial, in a worker process."""

    def notes(self, results: _Kept, setting: Setting, console: Console) -> list[str]:
        """Return lines below the table in Markdown; none by default.

        Parameters
        ----------
        results : Results
            Those of `run`.
        setting : Setting
        console : Console
            Shows the progress, where they take long.
        """
        return []

    def run(self, name: str, setting: Setting, console: Console) -> _Kept:
        """Run every case on every trial that has no row yet, trial by trial.

        Parameters
        ----------
        name : str
            The suite's, for the table.
        setting : Setting
        console : Console
            Shows the progress.

        Raises
        ------
        ValueError
            If no case is chosen, or the kept results depend on other facts.
        """
        results = self.results(name, setting)
        seeds = range(setting.seed, setting.seed + setting.trials)
        missing = results.missing(setting.only, seeds)
        if missing:
            shared = self, setting.clients([case for case, _ in missing], console.print), setting
            for rows in in_processes(_trial, shared, missing, setting.workers, name, console):
                results.add(rows, setting.workers)
        return results


def _trial(shared: tuple[Suite[Any], Clients, Setting], case: Case, seed: int) -> list[Row]:
    suite, clients, setting = shared
    return suite.trial(case, seed, clients, setting)


@dataclass(frozen=True)
class AttackSuite(Suite[AttackResults]):
    """A benchmark of attacks. The first case of a client, at equal budgets, is the reference.

    The others are compared with it, trial by trial.
    """

    @property
    def pictures(self) -> bool:
        """Whether rows hold images, see `attack_trial`."""
        return False

    def results(self, name: str, setting: Setting) -> AttackResults:
        """See `Suite`."""
        cases = self.cases
        if setting.updates:
            from fl_app.benchmarks.beside import cases_beside  # slow to import

            cases += tuple(cases_beside(setting.updates, cases))
        return AttackResults(name, cases, setting.facts, setting.path)

    def trial(self, case: Case, seed: int, clients: Clients, setting: Setting) -> list[Row]:
        """See `Suite`."""
        # Slow to import, and only workers need it.
        from fl_app.benchmarks.beside import images_beside, is_written, update_folder, write_update
        from fl_app.benchmarks.trial import attack_trial

        found = None
        if setting.updates:
            folder = update_folder(setting.updates, case, seed)
            if not is_written(folder):
                write_update(folder, *clients.draw(case, seed)[:2])
            if case.attack.name not in ATTACKS:
                found = images_beside(folder, case, case.count)
                if found is None:  # the tool has images of other clients
                    return []
        prior, weights = setting.prior, setting.lpips_weights
        return [attack_trial(case, seed, clients, prior, weights, self.pictures, found)]


@dataclass(frozen=True)
class ReadingSuite(Suite["ReadingResults"]):
    """A benchmark that reads something off clients' updates; the cases' attacks are not run.

    Attributes
    ----------
    title : str
        What the table shows.
    """

    title: str

    @abstractmethod
    def read(self, observation: Observation, knowledge: Knowledge, truth: Truth) -> list[Row]:
        """Return the rows of one client, without its name and seed."""

    @abstractmethod
    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """Return the lines of the table of rows, its head first."""

    def shortfalls(self, rows: Sequence[Row]) -> list[str]:
        """Return, in words, every figure of rows that misses its threshold."""
        return []

    def results(self, name: str, setting: Setting) -> ReadingResults:
        """See `Suite`.

        Raises
        ------
        ConfigError
            If a prior is chosen.
        """
        if setting.prior != PriorConfig():
            raise ConfigError(f"prior is {setting.prior.weights!r}; {name} attacks with none")
        return ReadingResults(name, self.cases, setting.facts, setting.path, suite=self)

    def trial(self, case: Case, seed: int, clients: Clients, setting: Setting) -> list[Row]:
        """See `Suite`."""
        state = clients.state_of(case)
        shared = {"client": case.client, "seed": seed, "prior": ""}
        shared["model_accuracy"] = state.accuracy if state else None
        return [{**shared, **row} for row in self.read(*clients.draw(case, seed))]


@dataclass
class ReadingResults(Results):
    """The rows of a `ReadingSuite`."""

    suite: ReadingSuite = field(kw_only=True)

    row_key = "client"

    def case_name(self, case: Case) -> str:
        """Return the client alone: the attack is not run."""
        return case.client

    def cells(self) -> list[list[str]]:
        """See `ReadingSuite`."""
        return self.suite.cells(self.rows)

    def table(self) -> Table:
        """Return the whole table for a screen."""
        return self.whole_table(self.suite.title)

    def shortfalls(self) -> list[str]:
        """See `ReadingSuite`."""
        return self.suite.shortfalls(self.rows)

"""What the report reads of a run's folder, by the readers that everyone uses. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fl_app.audit.leakage_log import read_lines
from fl_app.audit.rounds import RoundLine, by_round, read_accuracy
from fl_app.config import Config, ConfigError, from_settings, read_settings
from fl_app.runs.advice import Advice, read_advice
from fl_app.runs.folder import DESCRIBED
from fl_app.util.reading import BrokenFileError, read_json


@dataclass(frozen=True)
class Source:
    """A run's folder, read.

    Attributes
    ----------
    folder : Path
    settings : mapping
        What config.yaml holds; empty where it can't be read.
    config : Config or None
        None where it is none of this version.
    lines : sequence of dict
        Of the log: each attack's last one on an update, in the order of the log.
    accuracy : mapping of int to (float or None)
        See `read_accuracy`.
    rounds : sequence of RoundLine
    compared : mapping
        What comparison.json holds; empty where there is none.
    advice : sequence of Advice
        What advise.json holds.
    problems : sequence of str
        What could not be read, and why.
    """

    folder: Path
    settings: Mapping[str, Any]
    config: Config | None
    lines: Sequence[dict[str, Any]]
    accuracy: Mapping[int, float | None]
    rounds: Sequence[RoundLine]
    compared: Mapping[str, Any]
    advice: Sequence[Advice]
    problems: Sequence[str]

    @cached_property
    def _names(self) -> dict[str, str]:
        """Clients' names by node, from the lines that say them."""
        return {line["node"]: _client_words(line) for line in self.lines if _named(line)}

    def client(self, line: Mapping[str, Any]) -> str:
        """Return whose update a line is about, in a word."""
        if _named(line):
            return _client_words(line)
        return self._names.get(line["node"], f"node {line['node']}")

    @property
    def described(self) -> bool:
        """Whether the clients are of a user's own federation, described by a file."""
        return DESCRIBED in self.settings

    def of(self, attack: str) -> list[dict[str, Any]]:
        """Return the lines of an attack."""
        return [line for line in self.lines if line["attack"] == attack]

    @property
    def attacks(self) -> list[str]:
        """The attacks that were run."""
        return list(dict.fromkeys(line["attack"] for line in self.lines))

    def setting(self, *where: str) -> str:
        """Return what config.yaml says at a place, as text; "" where it says nothing."""
        found: Any = self.settings
        for key in where:
            found = found.get(key) if isinstance(found, Mapping) else None
        return "" if found is None or isinstance(found, Mapping) else str(found)


def read_source(folder: Path) -> Source:
    """Read a run's folder. What is damaged in it costs itself, and is named."""
    problems: list[str] = []
    settings: dict[str, Any] = {}
    config = None
    try:
        settings = read_settings(folder / "config.yaml")
        config = from_settings(settings, folder / "config.yaml")
    except ConfigError as error:
        problems.append(str(error))
    logged, bad = read_lines(folder / "leakage.jsonl")
    problems += map(str, bad)
    latest = {(line["attack"], line["round"], line["node"]): line for line in logged}
    accuracy: dict[int, float | None] = {}
    compared: dict[str, Any] = {}
    try:
        accuracy = read_accuracy(folder)
    except BrokenFileError as error:
        problems.append(str(error))
    try:
        if os.path.lexists(folder / "comparison.json"):
            compared = read_json(folder / "comparison.json", dict[str, Any])
    except BrokenFileError as error:
        problems.append(str(error))
    advice: list[Advice] = []
    try:
        advice = read_advice(folder)
    except BrokenFileError as error:
        problems.append(str(error))
    lines = list(latest.values())
    return Source(
        folder,
        settings,
        config,
        lines,
        accuracy,
        by_round(lines, accuracy),
        compared,
        advice,
        problems,
    )


def _client_words(line: Mapping[str, Any]) -> str:
    """Return the client of a line that says it."""
    return f"sum of {len(line['clients'])}" if line["clients"] else str(line["client"])


def _named(line: Mapping[str, Any]) -> bool:
    return bool(line["clients"]) or line["client"] is not None


def rounds_words(rounds: Iterable[int]) -> str:
    """Return some rounds in words: ``round 1``, ``rounds 1 and 3``, ``rounds 1 to 20``."""
    found = sorted(set(rounds))
    if len(found) == 1:
        return f"round {found[0]}"
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"rounds {found[0]} to {found[-1]}"
    shown = [str(each) for each in found]
    if len(found) > 8:
        return f"{len(found)} rounds from {shown[0]} to {shown[-1]}"
    return f"rounds {', '.join(shown[:-1])} and {shown[-1]}" if found else "no round"


def number(value: float | None, digits: int, unit: str = "") -> str:
    """Return a number in words; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def plural(count: int, noun: str) -> str:
    """Return ``1 image``, ``2 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

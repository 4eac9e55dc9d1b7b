"""From a run's folder to what the report says of it. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fl_app.audit.defense_effect import defense_advice
from fl_app.audit.rounds import rounds_cells
from fl_app.config import ConfigError
from fl_app.protocol import Defense
from fl_app.report.evidence import signed
from fl_app.report.model import Pair, Report
from fl_app.report.setting import setting
from fl_app.report.source import Source, read_source
from fl_app.report.tables import comparison, config_cells, failures
from fl_app.report.updates import Drawn, draw_updates, heat_map
from fl_app.report.verdict import main_attack, verdict_of
from fl_app.report.words import assumptions, measures, untested

_WORST = 3  # pairs on the first screen
# What looks like a whole path; what a data URI or a share such as 5/5 holds does not.
_PATH = re.compile(r"(?<![\w./-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"(),;:]+[/\\])*[^\s/\\'\"(),;:]+")

_T = TypeVar("_T")


def collect(run_dir: Path, redact: bool = False) -> Report:
    """Return what the report of a run says.

    What is damaged in the folder costs itself, and is among the problems.

    Parameters
    ----------
    run_dir : Path
        A run's folder.
    redact : bool
        Scores alone: no private or reconstructed picture, no link to one, no class of a
        private image, and no path of this machine.
    """
    source = read_source(run_dir)
    attack = main_attack(source)
    drawn = draw_updates(source, attack, pictures=not redact)
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    compared, notes = comparison(source)
    changed, config = config_cells(source)
    worst = _worst(drawn, attack)
    report = Report(
        run=run_dir.name,
        written=written,
        private=_private(drawn),
        redacted=redact,
        verdict=verdict_of(source, attack),
        worst=worst,
        assumptions=tuple(assumptions(source)),
        untested=tuple(untested(source)),
        setting=tuple(setting(source)),
        signed=signed(source, written),
        defences=tuple(_defences(source)),
        measures=measures(source.advice),
        advice=tuple(source.advice),
        heat_map=heat_map([*drawn.updates, *drawn.others]),
        updates=drawn.updates,
        others=drawn.others,
        images=drawn.images,
        more=drawn.more,
        rounds=rounds_cells(source.rounds) if source.rounds else [],
        comparison=compared,
        notes=notes,
        failures=failures(source),
        changed=changed,
        config=config,
        settings=drawn.settings,
        protocols=drawn.protocols,
        problems=(*source.problems, *drawn.problems),
    )
    return _without_paths(report, run_dir) if redact else report


def _worst(drawn: Drawn, attack: str) -> tuple[Pair, ...]:
    """Return the pairs of the verdict's attack that show the most, each of which is scored."""
    attempts = [each for update in drawn.updates for each in update.attempts]
    pairs = [pair for each in attempts if each.attack == attack for pair in each.pairs]
    scored = [pair for pair in pairs if pair.psnr is not None]
    scored.sort(key=lambda pair: (bool(pair.identified), pair.psnr), reverse=True)
    return tuple(scored[:_WORST])


def _private(drawn: Drawn) -> bool:
    attempts = (each for update in drawn.updates for each in update.attempts)
    return any(each.picture for each in attempts) or any(each.picture for each in drawn.others)


def _defences(source: Source) -> Iterator[str]:
    """Yield what the clients did against being seen, and what it brought."""
    if source.config and source.config.defense == Defense():
        yield "None: clients send their updates as they are."
        return
    said = dict.fromkeys(line["defense"] for line in source.lines)
    yield from (f"{words}." for words in said if words != "none")
    try:
        if words := defense_advice(source.folder):
            yield words
    except ConfigError:
        return  # it is among the problems


def _without_paths(report: Report, run_dir: Path) -> Report:
    known = [str(path) for path in (run_dir, run_dir.parent, Path.home()) if len(path.parts) > 1]

    def scrub(text: str) -> str:
        for path in known:
            text = text.replace(path, "(path)")
        return _PATH.sub("(path)", text)

    return _mapped(report, scrub)


def _mapped(value: _T, change: Any) -> _T:
    """Return a value of dataclasses and sequences with every text in it changed."""
    found: Any = value
    if isinstance(value, str):
        found = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        inner = {each.name: _mapped(getattr(value, each.name), change) for each in fields(value)}
        found = replace(value, **inner)
    elif isinstance(value, Mapping):
        found = {key: _mapped(each, change) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        found = type(value)(_mapped(each, change) for each in value)
    return found  # type: ignore[no-any-return]

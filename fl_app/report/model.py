"""What a report says: plain data, in the order of the page. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fl_app.runs.advice import Advice

Cells = Sequence[Sequence[str]]
"""A table; its head comes first."""


@dataclass(frozen=True)
class Verdict:
    """What the run shows, in a sentence.

    Attributes
    ----------
    level : {"leaks", "quiet", "unknown"}
        quiet: no leak beyond chance was shown; unknown: the run can't say.
    sentence : str
    beside : tuple of str
        Chance, attack and what else is to be known with it.
    definition : str
        What the sentence's verb means.
    """

    level: Literal["leaks", "quiet", "unknown"]
    sentence: str
    beside: tuple[str, ...]
    definition: str


@dataclass(frozen=True)
class Assumption:
    """Something that the attacker was given.

    Attributes
    ----------
    topic, words : str
    mark : {"realistic", "generous", "strict"}
        What a real server in its place has: the same, less, or more.
    """

    topic: str
    words: str
    mark: Literal["realistic", "generous", "strict"]


@dataclass(frozen=True)
class Measure:
    """Something to do against what leaks.

    Attributes
    ----------
    words, why : str
    effect : str
        What it changed on this run's own updates.
    """

    words: str
    why: str
    effect: str


@dataclass(frozen=True)
class Pair:
    """A private image and its reconstruction.

    Attributes
    ----------
    anchor : str
        Of its update on the page.
    round, image : int
    client, attack : str
    labels : str
        The image's class, and that of the reconstruction where it differs.
    psnr, ssim, lpips, single_colour : float or None
    identified : bool or None
    rank : str
        Its place among how many, in words.
    private, found : str
        PNGs as data URIs; "": not on the page.
    """

    anchor: str
    round: int
    image: int
    client: str
    attack: str
    labels: str
    psnr: float | None
    ssim: float | None
    lpips: float | None
    single_colour: float | None
    identified: bool | None
    rank: str
    private: str = ""
    found: str = ""


@dataclass(frozen=True)
class Attempt:
    """One attack on one update: a line of the log.

    Attributes
    ----------
    attack, status, error : str
    facts : tuple of (str, str)
        Scores, costs and how it ended, by name.
    pairs : tuple of Pair
        Worst first.
    more : int
        Images that are left out of `pairs`.
    losses, psnr_by_step : tuple of (float or None)
    mean_colour : float or None
        PSNR of the mean-colour baseline, dB.
    diagnosis : tuple of str
    reasons : tuple of (str, str)
        Why a field of the line is null.
    settings, protocol : int
        Places in `Report.settings` and `Report.protocols`.
    command : str
        What repeats it.
    picture : str
        Path of the file with all its images, from the run's folder; "": none.
    """

    attack: str
    status: str
    error: str
    facts: tuple[tuple[str, str], ...]
    pairs: tuple[Pair, ...]
    more: int
    losses: tuple[float | None, ...]
    psnr_by_step: tuple[float | None, ...]
    mean_colour: float | None
    diagnosis: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]
    settings: int
    protocol: int
    command: str
    picture: str


@dataclass(frozen=True)
class Update:
    """What one client sent in one round, and the attacks on it.

    Attributes
    ----------
    anchor, client, node : str
    round : int
    images : int or None
        That the client trained on.
    summary : str
        The outcome of the verdict's attack, in words.
    cell : str
        The same for the heat map.
    heat : int
        0 (nothing leaked) to 5; -1: no outcome.
    picture : str
        Path of the first attempt's file of images, from the run's folder; "": none.
    attempts : tuple of Attempt
        That of the verdict's attack first; empty where the page has no room for them.
    """

    anchor: str
    round: int
    client: str
    node: str
    images: int | None
    summary: str
    cell: str
    heat: int
    picture: str
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class HeatMap:
    """Rounds by clients.

    Attributes
    ----------
    clients : tuple of str
    rounds : tuple of int
    cells : mapping of (int, str) to Update
    shows : str
        What a cell's words are.
    """

    clients: tuple[str, ...]
    rounds: tuple[int, ...]
    cells: Mapping[tuple[int, str], Update]
    shows: str


@dataclass(frozen=True)
class Report:
    """All that the page says of a run.

    Attributes
    ----------
    run, written : str
        Name, and when the report was made.
    private : bool
        Whether it shows private images or links to them.
    redacted : bool
    verdict : Verdict
    worst : tuple of Pair
    assumptions : tuple of Assumption
    untested : tuple of str
    setting, signed : tuple of (str, str)
        Data, model and accuracy; what the sign-off box holds.
    defences : tuple of str
    measures : tuple of Measure
    advice : tuple of Advice
        What `flowleak advise` tried; empty where it was not called.
    heat_map : HeatMap or None
    updates, others : tuple of Update
        Worst first: with their attempts, and those that the page has no room for.
    images : tuple of Pair
        The worst of all updates, without pictures.
    more : int
        Images that are left out of `images`.
    rounds, comparison, failures, changed, config : table
        Empty where there is nothing to say.
    notes : tuple of str
        On the comparison.
    settings, protocols : tuple of (str, table)
        Attacks' constants and clients' training; each with its heading.
    problems : tuple of str
        What could not be read, and why.
    """

    run: str
    written: str
    private: bool
    redacted: bool
    verdict: Verdict
    worst: tuple[Pair, ...]
    assumptions: tuple[Assumption, ...]
    untested: tuple[str, ...]
    setting: tuple[tuple[str, str], ...]
    signed: tuple[tuple[str, str], ...]
    defences: tuple[str, ...]
    measures: tuple[Measure, ...]
    advice: tuple[Advice, ...]
    heat_map: HeatMap | None
    updates: tuple[Update, ...]
    others: tuple[Update, ...]
    images: tuple[Pair, ...]
    more: int
    rounds: Cells
    comparison: Cells
    notes: tuple[str, ...]
    failures: Cells
    changed: Cells
    config: Cells
    settings: tuple[tuple[str, Cells], ...]
    protocols: tuple[tuple[str, Cells], ...]
    problems: tuple[str, ...]

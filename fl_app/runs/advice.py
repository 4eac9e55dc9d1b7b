"""What changes would do about a run's leakage, as `flowleak advise` keeps it. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_app.util.files import write_text
from fl_app.util.reading import BrokenFileError, read_json

FOLDER, FILE, DRAWING = "advise", "advise.json", "advise.svg"
"""In a run's folder: what the attacks on changed updates found, the table, and its drawing."""

AS_IT_IS = "as it is"
"""The change that changes nothing; the others are held against it."""

_HOLLOW = 20  # epsilon above which a guarantee is one in name: odds change by e^20


@dataclass(frozen=True)
class Advice:
    """What a change does: a row of the table.

    Attributes
    ----------
    change : str
        `Change.words`.
    defense : str
    leaked, of : int
        Images that the attack identified, of those that were attacked; recognised ones where no
        candidates are there to identify them among.
    by : {"identified", "recognisable"}
    psnr, mean_colour : float or None
        Means over images, dB: of the attack, and of the mean-colour baseline.
    accuracy : float or None
        Of a federation that is trained with the change, in [0, 1]; None: not measured.
    epsilon, delta : float or None
        That DP-SGD spends over the rounds of that federation, see `epsilon_of`; None: no DP-SGD.
    seconds : float
        Of all its attacks together, each in one thread.
    problem : str
        Why a change was not tried; "": it was.
    note : str
        What is to be known beside its figures.
    """

    change: str
    defense: str = ""
    leaked: int = 0
    of: int = 0
    by: str = "identified"
    psnr: float | None = None
    mean_colour: float | None = None
    accuracy: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    seconds: float = 0.0
    problem: str = ""
    note: str = ""


def privacy_words(row: Advice) -> str:
    """Return what a change guarantees; "" where it trains without DP-SGD."""
    if row.epsilon is None:
        return ""
    words = f"epsilon {row.epsilon:,.1f} at delta {row.delta:g}"
    return words if row.epsilon <= _HOLLOW else f"{words}, which guarantees next to nothing"


def write_advice(folder: Path, setting: Mapping[str, Any], rows: Iterable[Advice]) -> None:
    """Write a run's advise.json, whole or not at all."""
    content = {"setting": setting, "rows": [asdict(row) for row in rows]}
    write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


def read_advice(folder: Path, setting: Mapping[str, Any] | None = None) -> list[Advice]:
    """Return the rows of a run's advise.json, if they are of a setting; none where it has none.

    Raises
    ------
    BrokenFileError
        If it can't be read.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    kept = read_json(path, dict[str, Any])
    if setting is not None and kept.get("setting") != setting:
        return []
    try:
        return [Advice(**row) for row in kept.get("rows", [])]
    except TypeError as error:
        raise BrokenFileError(f"{path} is no advice of this version: {error}") from error


def as_it_is(rows: Iterable[Advice]) -> Advice | None:
    """Return the row that the others are held against, where it is there."""
    return next((row for row in rows if row.change == AS_IT_IS), None)


def best(rows: Iterable[Advice], most: int = 3) -> list[Advice]:
    """Return the changes that at least halve what leaks, those that cost least accuracy first.

    Of the same accuracy, within a point, those after which least leaks come first.
    """
    rows = list(rows)
    now = as_it_is(rows)
    if now is None or now.problem or not now.leaked:
        return []
    tried = [row for row in rows if not row.problem and row.of and row is not now]
    halved = [row for row in tried if row.leaked / row.of <= now.leaked / now.of / 2]

    def order(row: Advice) -> tuple[float, float]:
        known = row.accuracy is not None and now.accuracy is not None
        lost = round(100 * (now.accuracy - row.accuracy)) if known else 0  # type: ignore[operator]
        return max(lost, 0), row.leaked / row.of

    return sorted(halved, key=order)[:most]

"""leakage.jsonl: one line a client, round and attack; a failure is a line too."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from fl_app.protocol import observation_id
from fl_app.util.reading import MOST_BYTES, BrokenFileError, check_regular, parse_json
from fl_app.util.schema import LARGEST_FLOAT, problem

MAX_LOSSES = 100
SCHEMA = 1  # what a line holds; another number is another version's

_NODE = re.compile(r"[0-9]{1,20}")
_PICTURE = re.compile(r"reconstructions/[^./\0][^/\0]*\.png")


class Summary(TypedDict):
    """What every score has; null where it is not finite."""

    mean: float | None
    baseline: float | None


class Score(Summary, total=False):
    """One metric of a line, see `fl_app.audit.metrics.MetricScore`.

    Lines of version 0.1.0 have ``low`` and ``high``, an interval over the client's images.
    """

    values: Sequence[float | None]
    median: float | None
    worst_tenth: float | None
    low: float | None
    high: float | None


class Identification(TypedDict):
    """Which private images a line identifies, see `fl_app.audit.identification`."""

    identified: Sequence[bool | None]
    rank: Sequence[int | None]
    candidates: Sequence[int]
    by: str


class ReferenceFree(TypedDict, total=False):
    """The scores of a line without a truth, see `fl_app.audit.reference_free`."""

    matching_loss: float | None
    tv: Score | None
    prior_residual: Score | None
    label_counts: Mapping[str, int]


@dataclass(frozen=True)
class LogLine:
    """One line of the log. What is None or missing has its reason in `reasons`.

    Its fields and their types are the log's schema: lines are checked when they are
    written and when they are read. A line of an older version may lack what has a default.

    Attributes
    ----------
    round : int
        As in the Observation.
    node : str
        That of the Observation, in digits: many programs round whole numbers above 2^53.
    client : int or None
        The partition; None where the update was not watched, -1 for a sum.
    clients : sequence of int
        Of a sum over clients (secure aggregation): their partitions.
    defense : str
        What the clients do so that less is seen, as settings; "none".
    defense_known : bool
        Whether the attacker knows it.
    update_bytes : int or None
        What the update takes in the best plain encoding, see
        `client_app.defenses.update_bytes`; None where no single one was seen.
    update_encoding : str
        Which encoding that is.
    attack, matching : str
        Name of the attack, and how it matched the update.
    status : {"ok", "failed", "skipped"}
        failed: the attack or its scoring raised; skipped: no attack was run.
    error : str or None
        Why, when not ok.
    metrics : mapping
        By metric: values (in training order), their mean, median and worst tenth, baseline.
    reference_free : mapping
        Scores that need no truth, see `reference_free`; empty where there is one.
    psnr_by_step : sequence of (float or None)
        Mean PSNR in dB of the images first used in each local step.
    determined : sequence of (float or None)
        See `Leakage`; without a truth in the order of the reconstruction.
    single_colour : sequence of (float or None)
        PSNR in dB of each image's own mean colour, in training order.
    recognisable : sequence of bool or None
        Whether each image's SSIM is above `fl_app.audit.exposure.RECOGNISABLE`.
    recognisable_chance : float or None
        Share of the images that the mean-colour baseline is recognisable as.
    identification : mapping or None
        Which images are identified: identified, rank, candidates, by.
    label_accuracy, label_chance : float or None
        Share of the images whose label the attack inferred, and what is expected
        without the update; None where the labels were given.
    labels_source : str or None
        "given", or the method that inferred them, or their order; None where no attack
        succeeded.
    device : str or None
        Where the attack ran: the GPU's name, or "cpu"; None where none succeeded, and in older
        lines.
    seconds, iterations_per_second : float
    iterations, peak_memory, flops : int
        Steps, bytes, floating-point operations.
    stop_reason : str
    options : mapping
        Every constant that the attack ran with.
    diagnosis : sequence of str
        What is likely wrong with the update or its objective.
    protocol : mapping
        What the clients agreed to: their model, its norm, and every attribute of
        `LocalTraining`, BatchNorm's mode among them.
    labels : {"by-step", "counts", "unknown"}
        What the attacker was given of the labels, see `Knowledge`.
    truth : bool
        Whether the auditor holds the client's private batch.
    num_examples : int or None
        N, as the client says.
    picture : str or None
        Path from the run's folder.
    job : str or None
        The queue entry that this is the outcome of.
    losses : sequence of float
        At most 100, evenly spaced over the iterations, first and last included.
    reasons : mapping of str to str
        Why a field is None, by its name.
    true_labels : sequence of int or None
        Class indices of the private images, in training order; None without a truth.
    found_labels : sequence of int
        Those of the reconstructions, in the order of `true_labels`; without a truth in
        their own order.
    run, dataset, prior : str
        Names: of the run's folder, the data set and the prior; "" in older lines, as is
        `dataset` where the data is the user's own.
    seed : int or None
        Of the run; None in older lines.
    written : str
        When the line was written, ISO 8601 in UTC; "" in older lines.
    schema : int
        `SCHEMA`.
    """

    round: int
    node: str
    client: int | None
    attack: str
    status: Literal["ok", "failed", "skipped"]
    labels: str
    error: str | None = None
    matching: str = ""
    metrics: Mapping[str, Score | None] = field(default_factory=dict)
    reference_free: ReferenceFree = field(default_factory=ReferenceFree)
    psnr_by_step: Sequence[float | None] = ()
    single_colour: Sequence[float | None] = ()
    determined: Sequence[float | None] = ()
    recognisable: Sequence[bool] | None = None
    recognisable_chance: float | None = None
    identification: Identification | None = None
    label_accuracy: float | None = None
    label_chance: float | None = None
    labels_source: str | None = None
    device: str | None = None
    seconds: float = 0.0
    iterations: int = 0
    iterations_per_second: float = 0.0
    peak_memory: int = 0
    flops: int = 0
    stop_reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    diagnosis: Sequence[str] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    truth: bool = False
    num_examples: int | None = None
    clients: Sequence[int] = ()
    defense: str = "none"
    defense_known: bool = True
    update_bytes: int | None = None
    update_encoding: str = ""
    picture: str | None = None
    job: str | None = None
    losses: Sequence[float | None] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    true_labels: Sequence[int] | None = None
    found_labels: Sequence[int] = ()
    run: str = ""
    dataset: str = ""
    prior: str = ""
    seed: int | None = None
    written: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class BadLine:
    """A line that is none of the log, for people to read.

    Attributes
    ----------
    path : Path
        The log.
    number : int
        Of the line, from 1; 0: the whole log.
    why : str
    """

    path: Path
    number: int
    why: str

    def __str__(self) -> str:
        where = f"{self.path}, line {self.number}" if self.number else str(self.path)
        return f"{where} is left out: {self.why}"


def observation_of(line: Mapping[str, Any]) -> str:
    """Return the id of the Observation that a line is of."""
    return observation_id(line["round"], int(line["node"]))


def thinned(losses: Sequence[float]) -> list[float]:
    """Return at most `MAX_LOSSES` losses, evenly spaced, first and last included."""
    if len(losses) <= MAX_LOSSES:
        return list(losses)
    step = (len(losses) - 1) / (MAX_LOSSES - 1)
    return [losses[round(i * step)] for i in range(MAX_LOSSES)]


def append_line(path: Path, line: LogLine) -> dict[str, Any]:
    """Append a line whole or not at all, as strict JSON; for a single writer.

    Numbers that are not finite, or huge, become null, with a reason.

    Returns
    -------
    dict
        The line as it stands there.

    Raises
    ------
    ValueError
        If it is none of the log, see `LogLine`; reading would leave it out.
    OSError
        If it could not be written, for example on a full disk; the file is
        then as long as before.
    """
    reasons = dict(line.reasons)
    entry = {f.name: _strict(getattr(line, f.name), f.name, reasons) for f in fields(line)}
    entry["reasons"] = reasons
    if words := _problem(entry):
        raise ValueError(f"no line of the leakage log: {words}")
    data = json.dumps(entry, allow_nan=False).encode() + b"\n"
    if len(data) > MOST_BYTES:
        raise ValueError(f"no line of the leakage log: it has {len(data):,} bytes")
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        length = os.fstat(handle).st_size
        if length and os.pread(handle, 1, length - 1) != b"\n":
            data = b"\n" + data  # a torn line must not spoil this one
        try:
            written = os.write(handle, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, length)
            raise
    finally:
        os.close(handle)
    return entry


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[BadLine]]:
    """Return the log's lines, and those that are left out.

    A process killed while writing can leave half a line at the end, and a disk or a
    hand anything. Each good line has every field of `LogLine`, and no other. A log that
    does not exist is empty.
    """
    lines: list[dict[str, Any]] = []
    bad: list[BadLine] = []
    if not os.path.lexists(path):
        return lines, bad
    try:
        for number, raw in _raw_lines(path):
            try:
                lines.append(_line(raw))
            except ValueError as error:
                bad.append(BadLine(path, number, str(error)))
    except BrokenFileError as error:
        bad.append(BadLine(path, 0, str(error)))
    return lines, bad


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is not blank, a too long one cut."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MOST_BYTES + 1):
                number += 1
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MOST_BYTES)
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise BrokenFileError(f"{path} can't be read: {error.strerror}") from error


def _line(raw: bytes) -> dict[str, Any]:
    """Return a line with all its fields.

    Raises
    ------
    ValueError
        If it is none, with the reason.
    """
    if len(raw) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    found = parse_json(raw, dict[str, Any])
    if found.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"its schema is {found['schema']!r:.20}; this version reads {SCHEMA}")
    line = _DEFAULTS | {name: found[name] for name in found if name in _NAMES}
    if line.get("labels") == "given":  # as version 0.1 called it
        line["labels"] = "by-step"
    if type(line.get("node")) is int:  # as it wrote it
        line["node"] = str(line["node"])
    if words := _problem(line):
        raise ValueError(words)
    return line


def _problem(line: Mapping[str, Any]) -> str:
    """Return why a line is none of the log, or nothing."""
    if words := problem(line, LogLine):
        return words
    if (line["label_accuracy"] is None) != (line["label_chance"] is None):
        return "label_accuracy and label_chance are not both there"
    if (found := line["identification"]) is not None:
        if len({len(found[name]) for name in ("identified", "rank", "candidates")}) > 1:
            return "identification is not of the same images throughout"
        if min(found["candidates"], default=0) < 0:
            return f"identification.candidates has {min(found['candidates'])}; allowed: 0 or more"
    if not _NODE.fullmatch(line["node"]):
        return f"node is {line['node']!r:.40}; allowed: a node's id, in digits"
    if line["picture"] is not None and not _PICTURE.fullmatch(line["picture"]):
        return f"picture is {line['picture']!r:.40}; allowed: reconstructions/NAME.png"
    return ""


def _strict(value: Any, name: str, reasons: dict[str, str]) -> Any:
    """Return `value` as plain JSON; an infinite or huge number becomes None with a reason."""
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        words = "too large" if math.isfinite(value) else "not finite"
        reasons.setdefault(name, f"{words} ({value})")
        return None
    if isinstance(value, Mapping):
        return {str(k): _strict(v, f"{name}.{k}", reasons) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v, name, reasons) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _strict(asdict(value), name, reasons)
    return value


def _default(field_: Field[Any]) -> Any:
    """Return a field's default as JSON has it; MISSING where it has none."""
    default = field_.default if field_.default_factory is MISSING else field_.default_factory()
    return list(default) if isinstance(default, tuple) else default


_NAMES = [each.name for each in fields(LogLine)]
_DEFAULTS = {
    each.name: default for each in fields(LogLine) if (default := _default(each)) is not MISSING
}

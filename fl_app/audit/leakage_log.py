"""leakage.jsonl: one line a client, round and attack; a failure is a line too."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

MAX_LOSSES = 100


@dataclass(frozen=True)
class LogLine:
    """One line of the log. What is None or missing has its reason in `reasons`.

    Attributes
    ----------
    round, node : int
        As in the Observation.
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
        By metric: mean, low, high, values (in training order), baseline.
    reference_free : mapping
        Scores that need no truth, see `reference_free`; empty where there is one.
    psnr_by_step : sequence of (float or None)
        Mean PSNR in dB of the images first used in each local step.
    label_accuracy, label_chance : float or None
        Share of the images whose label the attack counted, and what is expected
        without the update; None where the labels were given.
    labels_source : str or None
        "given", or the method that recovered them; None where no attack succeeded.
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
    labels : {"given", "unknown"}
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
    """

    round: int
    node: int
    client: int | None
    attack: str
    status: str
    labels: str
    error: str | None = None
    matching: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reference_free: Mapping[str, Any] = field(default_factory=dict)
    psnr_by_step: Sequence[float | None] = ()
    label_accuracy: float | None = None
    label_chance: float | None = None
    labels_source: str | None = None
    seconds: float = 0.0
    iterations: int = 0
    iterations_per_second: float = 0.0
    peak_memory: int = 0
    flops: int = 0
    stop_reason: str = ""
    options: Mapping[str, float | int | str] = field(default_factory=dict)
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
    losses: Sequence[float] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


def thinned(losses: Sequence[float]) -> list[float]:
    """Return at most `MAX_LOSSES` losses, evenly spaced, first and last included."""
    if len(losses) <= MAX_LOSSES:
        return list(losses)
    step = (len(losses) - 1) / (MAX_LOSSES - 1)
    return [losses[round(i * step)] for i in range(MAX_LOSSES)]


def append_line(path: Path, line: LogLine) -> None:
    """Append a line whole or not at all, as strict JSON; for a single writer.

    Numbers that are not finite become null, with a reason.

    Raises
    ------
    OSError
        If it could not be written, for example on a full disk; the file is
        then as long as before.
    """
    reasons = dict(line.reasons)
    entry = {f.name: _strict(getattr(line, f.name), f.name, reasons) for f in fields(line)}
    data = json.dumps({**entry, "reasons": reasons}, allow_nan=False).encode() + b"\n"
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


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the log's lines, and how many torn ones were skipped.

    A process killed while writing can leave half a line at the end. A log that
    does not exist is empty.
    """
    lines: list[dict[str, Any]] = []
    torn = 0
    for raw in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif raw.strip():
            torn += 1
    return lines, torn


def _strict(value: Any, name: str, reasons: dict[str, str]) -> Any:
    """Return `value` as plain JSON; a number that is not finite becomes None with a reason."""
    if isinstance(value, float) and not math.isfinite(value):
        reasons.setdefault(name, f"not finite ({value})")
        return None
    if isinstance(value, Mapping):
        return {str(k): _strict(v, f"{name}.{k}", reasons) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v, name, reasons) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _strict(asdict(value), name, reasons)
    return value

"""The attacks of a run, from its queue on disk to its log: here, or in a process of their own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import observation_of
from fl_app.audit.on_line import OnLine
from fl_app.audit.reconstructions import read_reconstruction
from fl_app.config import AttackConfig
from fl_app.protocol import Knowledge, Observation, Reconstruction
from fl_app.runs.facts import open_auditor
from fl_app.runs.lock import only_one
from server_strategies.attack_pool import (
    AttackPool,
    Job,
    QueueEntry,
    enqueue,
    new_id,
    pending,
    queue_path,
    read_queue,
)
from server_strategies.attacks.forecast import forecast
from server_strategies.observations import ObservationStore

_log = logging.getLogger("flwr")  # Flower streams it to the user

_IN_MEMORY = 2 * 64  # jobs with their observations; all others stay on disk
_KEPT = (  # of a reconstruction, in its line
    "attack", "matching", "losses", "iterations", "seconds", "peak_memory", "flops",
    "stop_reason", "options", "diagnosis", "labels_source", "determined",
)  # fmt: skip
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""Of text that is printed as it is."""
_RESTART_AFTER = 5.0  # seconds before the attacks' process is started again


def open_pool(auditor: Auditor) -> AttackPool:
    """Return a pool of attacks, to be used as a context, whose outcomes the auditor records."""
    return AttackPool(
        auditor.run_dir,
        auditor.config.pool,
        on_result=lambda job, found, where: auditor.record(job.observation, found, job.id, where),
        on_error=lambda job, error: auditor.record_failure(
            job.observation, job.attack.name, error, job.id
        ),
    )


def queue_attacks(auditor: Auditor, attack: AttackConfig, again: bool) -> int:
    """Queue an attack on a run's Observations, and return on how many.

    Parameters
    ----------
    auditor : Auditor
    attack : AttackConfig
    again : bool
        On all of them; else on those that have neither a line in the log nor a job in the queue.
    """
    folder, config = auditor.run_dir, auditor.config
    with only_one(folder):
        had = set()
        if not again:
            had |= {observation_of(line) for line in auditor.lines()}
            had |= {entry.observation for entry in pending(folder)}
        chosen = [id_ for id_ in ObservationStore(folder).ids() if id_ not in had]
        for id_ in chosen:
            job = new_id(id_, attack)
            enqueue(folder, QueueEntry(id_, attack, config.prior, config.seed, job))
    return len(chosen)


def finish_attacks(
    auditor: Auditor, console: Console, ended: Callable[[], bool] = lambda: True
) -> int:
    """Run every attack in a run's queue, and record its outcome.

    An attack whose line is in the log already is not run again: the process was
    killed between writing the line and taking the job out of the queue. What is no
    entry, or whose Observation can't be read, is named, and the others go on.

    Parameters
    ----------
    auditor : Auditor
    console : Console
        Shows how far the attacks are.
    ended : callable
        Whether no further job will come.

    Returns
    -------
    int
        Jobs found in the queue.
    """
    folder, store = auditor.run_dir, ObservationStore(auditor.run_dir)
    seen: set[str] = set()
    told: set[int] = set()
    with only_one(folder), open_pool(auditor) as pool:
        logged = {line.get("job") for line in auditor.lines()}

        def feed() -> int:
            over = ended()  # before the queue is read, so that the last job is in it
            new, bad = read_queue(folder, seen)
            for id_, why in bad.items():
                seen.add(id_)
                console.print(f"Left in the queue: {why}", style="yellow", **PLAIN)
            for entry in new[: max(0, _IN_MEMORY - pool.unfinished)]:
                seen.add(entry.id)
                try:
                    if entry.id in logged:
                        queue_path(folder, entry.id).unlink(missing_ok=True)
                    else:
                        _take(pool, store, auditor, entry, told, console)
                except OSError as error:  # say, a full disk
                    why = f"Left in the queue: {entry.id}: {error}"
                    console.print(why, style="yellow", **PLAIN)
            return len([entry for entry in new if entry.id not in seen]) + (not over)

        pool.drain(console, feed)
    return len(seen)


def _take(
    pool: AttackPool,
    store: ObservationStore,
    auditor: Auditor,
    entry: QueueEntry,
    told: set[int],
    console: Console,
) -> None:
    """Hand a queue entry to the pool, or log why that can't be.

    What to expect is printed of the first update of so many images; `told` keeps their numbers.
    """
    try:
        observation = store.load(entry.observation)
    except Exception as error:  # whatever is wrong with the file, the others are attacked
        auditor.record_unreadable(entry.observation, entry.attack.name, str(error), entry.id)
        queue_path(auditor.run_dir, entry.id).unlink(missing_ok=True)
        return
    try:
        knowledge = auditor.grant(observation)
    except ValueError as error:
        auditor.record_failure(observation, entry.attack.name, str(error), entry.id)
        queue_path(auditor.run_dir, entry.id).unlink(missing_ok=True)
        return
    if observation.num_examples not in told:
        told.add(observation.num_examples)
        tell_forecast(observation, knowledge, entry.attack, console)
    pool.take(Job(observation, knowledge, entry.attack, entry.prior, entry.seed, entry.id))


def tell_forecast(
    observation: Observation, knowledge: Knowledge, attack: AttackConfig, console: Console
) -> None:
    """Print what to expect of an attack, see `forecast`; nothing where it can't be run."""
    with contextlib.suppress(ValueError, RuntimeError):  # the attack itself says why
        words = forecast(observation, knowledge).words(attack.iterations, attack.seconds)
        console.print(words, **PLAIN)


class AttackProcess:
    """Runs a run's attacks in a process of their own, beside a training that must not fail.

    A process that drives Ray ends when Ray's head does, and takes what else it
    does with it. So in a deployment the training hands its jobs over on disk,
    and this process is started again whenever it ends early. If the training's
    process dies, this one finishes the queue and ends.

    Parameters
    ----------
    run_dir : Path
    tell : callable
        Takes each line that the process prints, in a thread of its own.
    on_line : str
        The function that gets its lines, see `load_on_line`; "": none.
    starts : int
        How often it is started again after the training's end, before the rest is
        left in the queue.
    """

    def __init__(
        self, run_dir: Path, tell: Callable[[str], None], on_line: str = "", starts: int = 3
    ) -> None:
        self._command = [
            sys.executable, "-m", "flowleak", "attack", run_dir.name,
            "--runs-dir", str(run_dir.parent), "--follow", "--on-line", on_line,
        ]  # fmt: skip
        self._tell = tell
        self._starts = starts
        self._ended = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._left_over = ""
        self._thread = threading.Thread(target=self._keep_running, daemon=True)
        self._thread.start()

    def drain(self) -> str:
        """Wait until the queue is empty; return why it is not, or nothing."""
        self._ended.set()
        if self._process:
            _close(self._process.stdin)
        self._thread.join()
        return self._left_over

    def _keep_running(self) -> None:
        failures = 0
        while True:
            code, last = self._run_once()
            if code == 0 and self._ended.is_set():
                return
            failures += self._ended.is_set()
            if failures > self._starts:
                self._left_over = last
                return
            self._tell(f"the attacks' process ended ({code}: {last}); it is started again")
            time.sleep(_RESTART_AFTER)

    def _run_once(self) -> tuple[int, str]:
        last = ""
        try:
            process = subprocess.Popen(
                self._command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # what ends the training must not end the attacks
            )
        except OSError as error:
            return -1, str(error)
        self._process = process
        if self._ended.is_set():
            _close(process.stdin)
        assert process.stdout
        for line in process.stdout:
            last = line.strip() or last
            self._tell(line.rstrip("\n"))
        return process.wait(), last


def _close(pipe: IO[str] | None) -> None:
    if pipe:
        pipe.close()


def watch_input() -> Callable[[], bool]:
    """Return a function that says whether standard input has ended.

    It ends when the process at its other end closes it, or dies.
    """
    ended = threading.Event()

    def read() -> None:
        while sys.stdin.read(1024):
            pass
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    return ended.is_set


def score_later(
    run_dir: Path,
    truth_dir: Path,
    tell: Callable[[str], None] = _log.warning,
    client: Path | None = None,
    on_line: OnLine | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score the reconstructions of a run without Truth, now that there is one.

    Parameters
    ----------
    run_dir : Path
    truth_dir : Path
        Holds ``truth/round-NNNN-node-ID.safetensors``, as clients write it; what
        it lacks stays unscored. It is not copied, but the pictures show it.
    tell, client, on_line
        See `open_auditor`.

    Returns
    -------
    lines : list of dict
        Those that joined the log.
    problems : list of str
        What could not be scored, and why; the others are.

    Raises
    ------
    FileNotFoundError
        If there is no ``truth/``.
    """
    if not (truth_dir / "truth").is_dir():
        raise FileNotFoundError(f"{truth_dir / 'truth'} is no folder; clients write it there")
    auditor = open_auditor(run_dir, tell, truth_dir, client, on_line)
    store, lines = ObservationStore(run_dir), auditor.lines()
    scored = {_of(line) for line in lines if line["metrics"]}
    problems = []
    for line in lines:
        if line["status"] != "ok" or line["metrics"] or _of(line) in scored:
            continue
        try:
            _score_line(auditor, store, line)
        except (ValueError, FileNotFoundError) as error:
            where = f"round {line['round']}, node {line['node']}, {line['attack']}"
            problems.append(f"{where} is not scored: {error}")
    return auditor.lines()[len(lines) :], problems


def _of(line: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what an attack's lines share; those of updates in files have no job."""
    return tuple(line[name] for name in ("job", "round", "node", "attack"))


def _score_line(auditor: Auditor, store: ObservationStore, line: Mapping[str, Any]) -> None:
    """Score a line's reconstruction, if its truth is there.

    Raises
    ------
    ValueError, FileNotFoundError
        If a file that this needs is missing, or can't be used.
    """
    observation = store.load(observation_of(line))
    if not auditor.has_truth(observation):
        return
    auditor.truth(observation)
    if line["picture"] is None:
        why = line["reasons"].get("picture", "no reason is logged")
        raise ValueError(f"its reconstruction was not kept: {why}")
    stored = read_reconstruction(auditor.run_dir / line["picture"])
    kept = {name: line[name] for name in _KEPT}
    # Losses that were not finite are null in the log.
    kept["losses"] = tuple(math.nan if loss is None else loss for loss in line["losses"])
    kept["labels_level"] = line["labels"]
    found = Reconstruction(images=stored.images, labels=stored.labels, **kept)
    auditor.record(observation, found, line["job"], line["device"])

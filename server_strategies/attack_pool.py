"""AttackPool: runs attacks in Ray actors beside the training, and survives their deaths."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fl_app.config import AttackConfig, PoolConfig, PriorConfig
from fl_app.files import write_text
from fl_app.protocol import Knowledge, Observation, Reconstruction
from server_strategies.attacks import run_attack

Report = Callable[[int, float], None]
Runner = Callable[[Observation, Knowledge, AttackConfig, PriorConfig, int, Report], Reconstruction]

_LINE_EVERY = 5.0  # seconds between progress lines where there is no terminal
_log = logging.getLogger("flwr")  # Flower streams it to the user


@dataclass(frozen=True)
class Job:
    """One attack on one observation.

    Attributes
    ----------
    observation : Observation
    knowledge : Knowledge
        What the attack may know.
    attack : AttackConfig
    prior : PriorConfig
    seed : int
        Seeds the attack.
    """

    observation: Observation
    knowledge: Knowledge
    attack: AttackConfig
    prior: PriorConfig
    seed: int

    @property
    def id(self) -> str:
        """A name for files, unique in a run for each attack."""
        return f"{self.observation.id}-{self.attack.name}"


@dataclass(frozen=True)
class QueueEntry:
    """A job that was submitted and has no outcome yet, as it lies on disk.

    Attributes
    ----------
    observation : str
        Id in the `ObservationStore`.
    attack, prior, seed
        As in the Job.
    """

    observation: str
    attack: AttackConfig
    prior: PriorConfig
    seed: int


def pending(folder: Path) -> list[QueueEntry]:
    """Return the jobs that a run left without an outcome, by round.

    Parameters
    ----------
    folder : Path
        The run's folder.

    Raises
    ------
    ValueError
        If an entry can't be read; the message names the file.
    """
    entries = []
    for path in sorted((folder / "queue").glob("[!.]*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["attack"] = AttackConfig(**fields["attack"])
            fields["prior"] = PriorConfig(**fields["prior"])
            entries.append(QueueEntry(**fields))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no queue entry of this version: {error}") from error
    return entries


class _Worker:
    """Lives in a worker's process: runs one attack at a time, and tells how far it is."""

    def __init__(self, runner: Runner, threads: int) -> None:
        self._runner = runner
        self._threads = threads
        self._progress: tuple[int, float] | None = None

    def run(self, job: Job) -> Reconstruction:
        # Both settings belong to the calling thread. Training comes first.
        if hasattr(os, "nice"):
            os.nice(19)
        torch.set_num_threads(self._threads)
        self._progress = None
        return self._runner(
            job.observation, job.knowledge, job.attack, job.prior, job.seed, self._report
        )

    def _report(self, iteration: int, loss: float) -> None:
        self._progress = (iteration, loss)

    def progress(self) -> tuple[int, float] | None:
        return self._progress


class AttackPool:
    """A queue of attacks on disk, and the workers that empty it.

    Workers are Ray actors, made on the first submit: in the simulation's own
    Ray, in the cluster that ``RAY_ADDRESS`` names, or in a local Ray that the
    pool starts and ends itself. They get the observation by value and never see
    a Truth. Use it as a context manager; leaving it ends the workers, and what
    has no outcome by then stays in ``queue/`` for another time.

    Parameters
    ----------
    folder : Path
        The run's folder.
    pool : PoolConfig
        Number of workers, and retries after a worker died or raised.
    on_result : callable
        Takes a job and its reconstruction. If it raises, `on_error` is called.
    on_error : callable
        Takes a job and a concise message. Both are called in a thread of this
        process, never at the same time.
    runner : callable
        As `run_attack`; runs in the worker's process.
    """

    def __init__(
        self,
        folder: Path,
        pool: PoolConfig,
        on_result: Callable[[Job, Reconstruction], None],
        on_error: Callable[[Job, str], None],
        runner: Runner = run_attack,
    ) -> None:
        self._queue = folder / "queue"
        self._retries = pool.retries
        self._size = pool.workers or torch.cuda.device_count() or 1
        self._on_result = on_result
        self._on_error = on_error
        self._runner = runner
        # One thread waits for each worker, so that nobody else has to.
        self._threads = ThreadPoolExecutor(self._size, thread_name_prefix="attack")
        self._outcome_lock = threading.Lock()
        self._worker_lock = threading.Lock()
        self._workers: list[Any] = []  # all that were ever made
        self._idle: list[Any] = []
        self._running: list[tuple[Job, Any]] = []  # with its worker
        self._futures: list[Future[None]] = []
        self._closed = False
        self._started_ray = False

    def __enter__(self) -> AttackPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        """Queue a job, on disk too, and return at once.

        Raises
        ------
        OSError
            If the queue entry can't be written; the job is not queued then.
        """
        entry = QueueEntry(job.observation.id, job.attack, job.prior, job.seed)
        write_text(self._entry(job), json.dumps(asdict(entry), indent=2))
        self._futures.append(self._threads.submit(self._attack, job))

    def drain(self, console: Console) -> None:
        """Wait until every job has an outcome, and show how far the attacks are.

        A terminal gets a progress bar; anything else a line every five seconds.
        """
        columns = (
            TextColumn("attacks"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        told = time.monotonic()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=1.0)
            while wait(self._futures, timeout=0.5).not_done:
                share, state = self._state()
                progress.update(bar, completed=share, description=state)
                if not console.is_terminal and time.monotonic() - told > _LINE_EVERY:
                    told = time.monotonic()
                    drawn = "#" * int(20 * share) + "-" * (20 - int(20 * share))
                    line = f"attacks [{drawn}] {share:4.0%}  {state}"
                    console.print(line, highlight=False, soft_wrap=True, markup=False)
            progress.update(bar, completed=1.0, description="")
        for future in self._futures:
            future.result()

    def close(self) -> None:
        """End the workers, and Ray if the pool started it."""
        with self._worker_lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)
        self._threads.shutdown(wait=True)
        if self._started_ray:
            ray.shutdown()

    def _entry(self, job: Job) -> Path:
        return self._queue / f"{job.id}.json"

    def _attack(self, job: Job) -> None:
        """Run a job to its outcome, in one of the pool's threads."""
        message = ""
        for _ in range(1 + self._retries):
            try:
                result = self._run(job)
            except Exception as error:  # raised by the attack, or the worker died
                if self._closed:
                    return
                message = _concise(error)
                _log.warning("attack %s: %s", job.id, message)
            else:
                self._deliver(job, result)
                return
        self._deliver(job, message)

    def _run(self, job: Job) -> Reconstruction:
        worker = self._take_worker()
        running = (job, worker)
        self._running.append(running)
        try:
            result = ray.get(worker.run.remote(job))
        except RayTaskError:
            self._idle.append(worker)  # it raised, but is alive
            raise
        finally:
            self._running = [other for other in self._running if other is not running]
        self._idle.append(worker)
        return result

    def _deliver(self, job: Job, outcome: Reconstruction | str) -> None:
        with self._outcome_lock:
            if isinstance(outcome, Reconstruction):
                try:
                    self._on_result(job, outcome)
                except Exception as error:  # say, a full disk
                    outcome = f"the result could not be recorded: {_concise(error)}"
            try:
                if isinstance(outcome, str):
                    self._on_error(job, outcome)
                self._entry(job).unlink(missing_ok=True)
            except Exception as error:  # the entry stays, for another time
                _log.error("attack %s has no outcome: %s", job.id, _concise(error))

    def _take_worker(self) -> Any:
        with self._worker_lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._idle:
                return self._idle.pop()
            if not ray.is_initialized():
                ray.init(
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
                )
                self._started_ray = True
            self._workers.append(self._new_worker())
            return self._workers[-1]

    def _new_worker(self) -> Any:
        # The simulation's clients hold every CPU that Ray counts: a worker that
        # asked for one would wait for ever. GPUs are asked for if they are free.
        gpus = ray.available_resources().get("GPU", 0.0)
        share = min(1.0, ray.cluster_resources().get("GPU", 0.0) / self._size)
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 2}
        if share and share <= gpus:
            options["num_gpus"] = share
        cores = os.cpu_count() or 1
        worker = ray.remote(_Worker).options(**options)  # type: ignore[attr-defined]
        return worker.remote(self._runner, max(1, cores // self._size))

    def _state(self) -> tuple[float, str]:
        """Return the share of all attacks' work that is done, and each running attack's state."""
        done = float(sum(future.done() for future in self._futures))
        words = []
        for job, worker in list(self._running):
            try:
                progress = ray.get(worker.progress.remote(), timeout=1)
            except Exception:  # it is starting, or has just died
                progress = None
            state = "starting"
            if progress:
                state = f"{progress[0]}/{job.attack.iterations}, loss {progress[1]:.4g}"
                done += progress[0] / job.attack.iterations
            seen = job.observation
            words.append(f"round {seen.round} client {seen.client}: {state}")
        return min(1.0, done / max(1, len(self._futures))), "; ".join(words)


def _concise(error: Exception) -> str:
    """Return an error's type and first line; of what happened in a worker, the cause's."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    shown = cause if isinstance(cause, Exception) else error
    lines = str(shown).strip().splitlines()
    return f"{type(shown).__name__}: {lines[0]}" if lines else type(shown).__name__

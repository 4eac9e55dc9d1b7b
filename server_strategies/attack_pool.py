"""AttackPool: runs attacks in Ray actors beside the training, and survives their deaths."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fl_app.config import AttackConfig, PoolConfig, PriorConfig, check_seed
from fl_app.protocol import Knowledge, Observation, Reconstruction
from fl_app.util.files import write_text
from fl_app.util.machine import device
from fl_app.util.ray_guard import SLOT, check_guarded, guarded_ray
from fl_app.util.reading import BrokenFileError, read_json
from server_strategies.attacks.run import run_attack
from server_strategies.observations import check_id

ray = guarded_ray()

Report = Callable[[int, float], None]
Runner = Callable[[Observation, Knowledge, AttackConfig, PriorConfig, int, Report], Reconstruction]

_LINE_EVERY = 5.0  # seconds between progress lines where there is no terminal
_MOST_WORKERS = 64  # in a cluster, each with a thread here that waits for it
# Without a GPU. Each attack takes 1 GB or more, and several attacks at a time use the cores better
# than one attack with more threads.
_MOST_ON_CPU = 4
_STARTS = 3  # of a local Ray, at most
_TOO_LONG = 45.0  # seconds without a worker, after which it is said what to do
_PATIENCE = 2.0  # seconds between checks whether a worker has started, or may start
_log = logging.getLogger("flwr")  # Flower streams it to the user


@dataclass(frozen=True)
class Job:
    """One attack on one observation.

    Attributes
    ----------
    observation : Observation
        What is attacked.
    knowledge : Knowledge
        What the attack may know.
    attack : AttackConfig
        Which attack runs, and its budget.
    prior : PriorConfig
        What it takes for natural.
    seed : int
        Restarts the attack.
    id : str
        A name for files, unique in a run; empty: a new one.
    """

    observation: Observation
    knowledge: Knowledge
    attack: AttackConfig
    prior: PriorConfig
    seed: int
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", new_id(self.observation.id, self.attack))


def new_id(observation: str, attack: AttackConfig) -> str:
    """Return the id of a new job, by its Observation's id and its attack."""
    # The same attack may be run on one update again, so the name needs a random suffix.
    return f"{observation}-{attack.name}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class QueueEntry:
    """A job that was submitted and has no outcome yet, as it is on disk.

    Its fields and their types are what a file of the queue has to hold.

    Attributes
    ----------
    observation : str
        Id in the `ObservationStore`.
    attack, prior, seed, id
        As in the Job.
    """

    observation: str
    attack: AttackConfig
    prior: PriorConfig
    seed: int
    id: str = ""


def enqueue(folder: Path, job: Job | QueueEntry) -> None:
    """Write a job to a run's queue, whole or not at all.

    Raises
    ------
    OSError
        If it could not be written.
    """
    if isinstance(job, Job):
        job = QueueEntry(job.observation.id, job.attack, job.prior, job.seed, job.id)
    entry = asdict(job)
    del entry["id"]  # the file's name
    write_text(queue_path(folder, job.id), json.dumps(entry, indent=2))


def queue_path(folder: Path, id_: str) -> Path:
    """Return where the queue entry of a job lies in a run's folder."""
    return folder / "queue" / f"{id_}.json"


def pending(folder: Path, known: Container[str] = ()) -> list[QueueEntry]:
    """Return the jobs that a run left without an outcome, by round; see `read_queue`."""
    return read_queue(folder, known)[0]


def read_queue(folder: Path, known: Container[str] = ()) -> tuple[list[QueueEntry], dict[str, str]]:
    """Return the jobs that a run left without an outcome, by round, and what is none.

    Parameters
    ----------
    folder : Path
        The run's folder.
    known : container of str
        Ids of jobs to leave out, unread.

    Returns
    -------
    entries : list of QueueEntry
    bad : dict of str to str
        By id: the file that is no entry, and why, in words.
    """
    entries, bad = [], {}
    for path in sorted((folder / "queue").glob("[!.]*.json")):
        if path.stem in known:
            continue
        try:
            entries.append(_read_entry(path))
        except ValueError as error:
            if os.path.lexists(path):  # else it has its outcome by now
                bad[path.stem] = str(error)
    return entries, bad


def _read_entry(path: Path) -> QueueEntry:
    found = read_json(path, QueueEntry)
    try:
        check_id(found["observation"])
        check_seed("seed", found["seed"])
        if not found["attack"].get("name"):
            raise ValueError("attack.name is missing")
        attack, prior = AttackConfig(**found["attack"]), PriorConfig(**found["prior"])
        return QueueEntry(found["observation"], attack, prior, found["seed"], path.stem)
    except (ValueError, TypeError) as error:  # TypeError: a setting of another version
        raise BrokenFileError(f"{path} is no queue entry of this version: {error}") from error


class _Worker:
    """A worker, in a process of its own: runs one attack at a time, and reports its progress."""

    def __init__(self, runner: Runner, threads: int) -> None:
        self._runner = runner
        self._threads = threads
        self._progress: tuple[int, float] | None = None

    def run(self, job: Job) -> tuple[Reconstruction, str]:
        """Return what a job's attack found, and the device that it ran on."""
        # Both settings are per thread. The training has priority.
        if hasattr(os, "nice"):
            os.nice(19)
        if self._threads:
            torch.set_num_threads(self._threads)
        self._progress = None
        found = self._runner(
            job.observation, job.knowledge, job.attack, job.prior, job.seed, self._report
        )
        return found, device()

    def _report(self, iteration: int, loss: float) -> None:
        self._progress = (iteration, loss)

    def progress(self) -> tuple[int, float] | None:
        return self._progress


class AttackPool:
    """A queue of attacks on disk, and the workers that empty it.

    Workers are Ray actors, started when there is something to do: in the simulation's
    own Ray, in the cluster that ``RAY_ADDRESS`` names, or in a local Ray that the pool
    starts and ends itself. In a cluster there are as many as its machines have slots
    (the resource `SLOT`). A machine that joins takes attacks, and those of one that
    leaves go to another. Workers get the observation by value and never see a Truth. Use
    the pool as a context manager: leaving it ends the workers, and jobs without an
    outcome stay in ``queue/`` for a later run.

    Parameters
    ----------
    folder : Path
        The run's folder.
    pool : PoolConfig
        Number of workers, in a cluster at most, and retries after a worker died or raised
        anything but a ValueError.
    on_result : callable
        Takes a job, its reconstruction, and the device that the attack ran on, see
        `fl_app.util.machine.device`. If it raises, `on_error` is called.
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
        on_result: Callable[[Job, Reconstruction, str], None],
        on_error: Callable[[Job, str], None],
        runner: Runner = run_attack,
    ) -> None:
        self._folder = folder
        self._retries = pool.retries
        self._cluster = "RAY_ADDRESS" in os.environ and not ray.is_initialized()
        self._cores = torch.get_num_threads()  # what this process may use
        here = torch.cuda.device_count() or min(self._cores, _MOST_ON_CPU)
        self._size = min(pool.workers or (_MOST_WORKERS if self._cluster else here), _MOST_WORKERS)
        self._on_result = on_result
        self._on_error = on_error
        self._runner = runner
        # One thread waits for each worker, so that nobody else has to.
        self._threads = ThreadPoolExecutor(self._size, thread_name_prefix="attack")
        self._outcome_lock = threading.Lock()
        self._worker_lock = threading.Condition()
        self._workers: list[Any] = []  # all that are not known to be dead
        self._idle: list[Any] = []
        self._running: list[tuple[Job, Any]] = []  # with its worker
        self._recording: list[str] = []  # ids of those whose outcome is being recorded
        self._futures: list[Future[None]] = []
        self._closed = False
        self._started_ray = False
        self._worked = time.monotonic()  # when there was last a worker

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
        enqueue(self._folder, job)
        self.take(job)

    def take(self, job: Job) -> None:
        """Queue a job whose entry is on disk already."""
        self._futures.append(self._threads.submit(self._attack, job))

    @property
    def unfinished(self) -> int:
        """How many jobs were queued and have no outcome yet."""
        return sum(not future.done() for future in self._futures)

    def drain(self, console: Console, feed: Callable[[], int] | None = None) -> None:
        """Wait until every job has an outcome, and show the progress of the attacks.

        A terminal gets a progress bar; anything else a line, where it is a new one, every five
        seconds.

        Parameters
        ----------
        console : Console
        feed : callable, optional
            Called twice a second; may queue further jobs, and returns how many
            are still to come.
        """
        columns = (
            TextColumn("attacks"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        last_time, last_line = time.monotonic(), ""
        with (
            _noted_interrupts() as interrupts,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            bar = progress.add_task("", total=1.0)
            while (coming := feed() if feed else 0) or self.unfinished:
                if interrupts:
                    raise KeyboardInterrupt
                if not wait(self._futures, timeout=0.5).not_done:
                    time.sleep(0.5)
                self._check()
                share, state = self._state(coming)
                progress.update(bar, completed=share, description=state)
                drawn = "#" * int(20 * share) + "-" * (20 - int(20 * share))
                line = f"attacks [{drawn}] {share:4.0%}  {state}"
                due = line != last_line and time.monotonic() - last_time > _LINE_EVERY
                if due and not console.is_terminal:
                    last_time, last_line = time.monotonic(), line
                    console.print(line, highlight=False, soft_wrap=True, markup=False)
            progress.update(bar, completed=1.0, description="")
        self._check()

    def _check(self) -> None:
        """Raise what ended a thread: Ray itself is gone, and none of the others will do better."""
        for future in self._futures:
            if future.done():
                future.result()

    def close(self) -> None:
        """End the workers, and Ray if the pool started it."""
        self._closed = True  # before the lock, which one that waits for Ray may hold
        with self._worker_lock:
            self._worker_lock.notify_all()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if ray.is_initialized():
            for worker in list(self._workers):
                self._drop(worker)
        self._threads.shutdown(wait=True)
        if self._started_ray:
            ray.shutdown()

    def _attack(self, job: Job) -> None:
        """Run a job to its outcome, in one of the pool's threads."""
        message = ""
        for _ in range(1 + self._retries):
            try:
                result = self._run(job)
            except Exception as error:  # raised by the attack, or the worker died
                if self._closed:
                    return
                if isinstance(error, ray.exceptions.RaySystemError | ConnectionError):
                    raise  # Ray itself is gone: it is not the attack that failed
                message = _concise(error)
                _log.warning("attack %s: %s", job.id, message)
                if isinstance(getattr(error, "cause", None), ValueError):
                    break  # invalid input, which a retry would not change
            else:
                self._deliver(job, result)
                return
        self._deliver(job, message)

    def _run(self, job: Job) -> tuple[Reconstruction, str]:
        worker = self._take_worker()
        running = (job, worker)
        self._running.append(running)
        try:
            result = ray.get(worker.run.remote(job))
        except ray.exceptions.RayTaskError:
            self._give_back(worker)  # it raised, but is alive
            raise
        except Exception:
            self._drop(worker)
            raise
        finally:
            self._running = [other for other in self._running if other is not running]
        self._give_back(worker)
        return result

    def _deliver(self, job: Job, outcome: tuple[Reconstruction, str] | str) -> None:
        self._recording.append(job.id)
        try:
            self._record(job, outcome)
        finally:
            self._recording.remove(job.id)

    def _record(self, job: Job, outcome: tuple[Reconstruction, str] | str) -> None:
        with self._outcome_lock:
            if isinstance(outcome, tuple):
                try:
                    self._on_result(job, *outcome)
                except OSError as error:  # say, a full disk: no fault of the attack's
                    self._leave(job, error)
                    return
                except Exception as error:
                    outcome = f"the result could not be recorded: {_concise(error)}"
            try:
                if isinstance(outcome, str):
                    self._on_error(job, outcome)
                queue_path(self._folder, job.id).unlink(missing_ok=True)
            except Exception as error:
                self._leave(job, error)

    def _leave(self, job: Job, error: Exception) -> None:
        """Say that a job stays in the queue, for a later run."""
        _log.error("attack %s has no outcome, and stays queued: %s", job.id, _concise(error))

    def _take_worker(self) -> Any:
        """Return an idle worker, or a new one as soon as one may be started."""
        while True:
            with self._worker_lock:
                if self._closed:
                    raise RuntimeError("the pool is closed")
                if self._idle:
                    return self._idle.pop()
                if not ray.is_initialized():
                    self._start_ray()
                if len(self._workers) >= self._capacity():
                    self._worker_lock.wait(_PATIENCE)
                    continue
                worker = self._new_worker()
                self._workers.append(worker)
            if self._started(worker):
                return worker
            self._drop(worker)

    def _start_ray(self) -> None:
        if self._cluster:
            self._wait_for_cluster(os.environ["RAY_ADDRESS"])
        else:
            check_guarded()
        for left in reversed(range(_STARTS)):
            try:
                ray.init(
                    **({} if self._cluster else {"include_dashboard": False, "address": "local"}),
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
                )
                break
            except Exception as error:
                # Ray gives its own processes 30 seconds, which a busy machine may not keep.
                if self._cluster or not left or "timed out" not in str(error):
                    raise
                ray.shutdown()
                _log.warning("Ray did not start in time, and is started again: %s", error)
        self._started_ray = True

    def _wait_for_cluster(self, address: str) -> None:
        """Wait until a cluster's head listens, but not for ever, as Ray itself would."""
        host, _, port = address.rpartition("/")[2].rpartition(":")
        if not port.isdecimal():
            return  # "auto": Ray knows at once
        began, told = time.monotonic(), False
        while not self._closed:
            try:
                socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
                return
            except OSError as error:
                if time.monotonic() - began > _TOO_LONG:
                    raise ConnectionError(
                        f"no Ray cluster answers at {address}, the RAY_ADDRESS: {error}. Start "
                        "flowleak lan server there, or unset RAY_ADDRESS; the queue stays"
                    ) from error
                if not told:
                    _log.warning("no Ray cluster answers at %s yet: %s", address, error)
                told = True
                time.sleep(0.5)
        raise RuntimeError("the pool is closed")

    def _capacity(self) -> int:
        """Return how many workers there may be; in a cluster that changes with its machines."""
        if not self._cluster:
            return self._size
        return min(self._size, int(ray.cluster_resources().get(SLOT, 0)))

    def _started(self, worker: Any) -> bool:
        """Wait for a worker to start; False: its slot is gone, or another is idle meanwhile."""
        answer = worker.progress.remote()
        while True:
            try:
                ray.get(answer, timeout=_PATIENCE)
                return True
            except ray.exceptions.GetTimeoutError:
                with self._worker_lock:
                    if self._closed or self._idle or len(self._workers) > self._capacity():
                        return False
            except Exception:
                self._drop(worker)
                raise

    def _advice(self) -> str:
        """Return what to do where no worker starts."""
        if self._cluster:
            return (
                "no machine of the cluster takes attacks: start flowleak lan worker on one, or "
                "the server with --attacks 1"
            )
        return (
            "no worker has started yet: wait where the machine is busy; else look at the memory "
            f"and disk that are left, and at Ray's logs in {os.environ.get('RAY_TMPDIR', '/tmp')}. "
            "Ctrl-C ends this, and the queue stays"
        )

    def _give_back(self, worker: Any) -> None:
        with self._worker_lock:
            self._idle.append(worker)
            self._worker_lock.notify()

    def _drop(self, worker: Any) -> None:
        with self._worker_lock:
            self._workers = [other for other in self._workers if other is not worker]
            self._worker_lock.notify()
        with suppress(Exception):  # Ray itself may be gone
            ray.kill(worker)

    def _new_worker(self) -> Any:
        # The simulation's clients hold every CPU that Ray counts: a worker that requests
        # one would never start. GPUs are requested if they are free.
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 2}
        threads = max(1, self._cores // self._size)
        if self._cluster:  # its machines define what a slot may use
            options["resources"], threads = {SLOT: 1}, 0
        else:
            gpus = ray.available_resources().get("GPU", 0.0)
            share = min(1.0, ray.cluster_resources().get("GPU", 0.0) / self._size)
            if share and share <= gpus:
                options["num_gpus"] = share
        worker = ray.remote(_Worker).options(**options)  # type: ignore[attr-defined]
        return worker.remote(self._runner, threads)

    def _state(self, coming: int = 0) -> tuple[float, str]:
        """Return the share of all attacks' work that is done, and each running attack's state."""
        recording = len(self._recording)
        done = float(sum(future.done() for future in self._futures) + recording)
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
        if self.unfinished and not words:
            waiting = self.unfinished - recording
            words.append(f"{waiting} wait for a worker" if waiting > 0 else "being scored")
            if waiting > 0 and time.monotonic() - self._worked > _TOO_LONG:
                words.append(self._advice())
        else:
            self._worked = time.monotonic()
        return min(1.0, done / max(1, len(self._futures) + coming)), "; ".join(words)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Note each SIGINT in a list; the second one does what the first would have done.

    A KeyboardInterrupt comes between any two instructions: it is lost in one of Ray's callbacks,
    and leaves a lock held where it comes beside one, for which `AttackPool.close` would wait.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    handler = before

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1 or handler is not signal.default_int_handler:
            handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _concise(error: Exception) -> str:
    """Return the type and first line of an error, or of its cause in a worker."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, Exception) else error
    lines = str(shown).strip().splitlines()
    return f"{type(shown).__name__}: {lines[0]}" if lines else type(shown).__name__

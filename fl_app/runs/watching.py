"""`watch`: a user's own Flower strategy records what its server sees, by two lines more."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_app.config import AuditConfig, ConfigError, WatchConfig, load_config
from fl_app.protocol import Client, Observation
from fl_app.runs.described import create_described_run, load_client
from fl_app.util.files import user_path
from server_strategies.honest_but_curious import HonestButCurious
from server_strategies.observations import MOST_IMAGES, ObservationStore
from server_strategies.recorder import Recorder

S = TypeVar("S", bound=Strategy)
_log = logging.getLogger("flwr")  # Flower streams it to the user


def watch(
    strategy: S,
    *,
    client: Client | str | Path,
    rounds: Sequence[int] = (),
    clients: Any = "all",
    runs_dir: str | Path = "runs",
    name: str = "watched",
) -> S:
    """Let a strategy record the updates that its server sees; nothing else of it changes.

    It is the strategy itself that is returned, with its own `start`, attributes and methods:
    `configure_train` and `aggregate_train` copy what passes through them. Messages and replies
    are passed on unmodified, and an error while recording is only logged.

    Parameters
    ----------
    strategy : Strategy
    client : Client, str or Path
        What the server knows of its clients, or the file that describes them, see `Client`. A
        relative path is looked for in the working folder, then beside the program's modules.
    rounds : sequence of int
        Rounds that are recorded, from 1; empty: every one.
    clients : "all", float or list of int
        Which clients: all, a share of each round's in (0, 1], or a list of the partitions that
        clients report (config record ``client``, key ``partition-id``) or of node ids.
    runs_dir : str or Path
        Folder of the run's folder.
    name : str
        Name of the run's folder; a number is added where it is taken.

    Returns
    -------
    Strategy
        The same object. ``flowleak attack RUNS_DIR/NAME`` attacks what it recorded.

    Raises
    ------
    ConfigError
        If the client's description or another argument can't be used.

    Examples
    --------
    >>> strategy = flowleak.watch(FedAvg(), client="audit.py", rounds=[1])  # doctest: +SKIP
    """
    file = "" if isinstance(client, Client) else str(_found(Path(client)))
    described = client if isinstance(client, Client) else load_client(Path(file))
    try:
        watched = WatchConfig(clients, list(rounds))
        config = replace(
            load_config({}),
            name=name,
            runs_dir=str(user_path(str(runs_dir))),
            # Truth is what clients of this package leave; a user's own bring it later.
            audit=AuditConfig(truth=False, labels="unknown"),
        )
    except ValueError as error:
        raise ConfigError(f"watch: {error}") from error
    run_dir = create_described_run(config, described, file)
    store = ObservationStore(run_dir)
    recorder = Recorder(store.save, on_skipped=lambda *_: None)  # it has been logged
    recorder.__enter__()

    def on_observation(observation: Observation) -> None:
        if observation.num_examples > MOST_IMAGES:
            raise ValueError(
                f"it holds {observation.num_examples} images; no attack takes more than "
                f"{MOST_IMAGES}"
            )
        recorder.add(observation)

    curious = HonestButCurious(
        _Methods(strategy),
        watch=watched,
        on_observation=on_observation,
        on_skipped=lambda *_: None,  # it has been logged
        examples_key=described.examples_key,
        examples=described.examples,
    )
    start = strategy.start

    @wraps(start)
    def recorded_start(*args: Any, **kwargs: Any) -> Any:
        try:
            return start(*args, **kwargs)
        finally:
            end()

    def end() -> None:
        """Wait for what is not written yet; further calls do nothing."""
        atexit.unregister(end)
        recorder.__exit__()
        count = len(store.ids())
        _log.info("flowleak recorded %d updates: flowleak attack %s", count, run_dir)

    atexit.register(end)  # where a program runs the rounds itself
    for method, own in (
        ("configure_train", curious.configure_train),
        ("aggregate_train", curious.aggregate_train),
        ("start", recorded_start),
    ):
        setattr(strategy, method, own)
    return strategy


class _Methods(Strategy):
    """A strategy's own methods, from before they were watched."""

    def __init__(self, strategy: Strategy) -> None:
        self._configure, self._aggregate = strategy.configure_train, strategy.aggregate_train

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        return self._aggregate(server_round, replies)

    def configure_evaluate(self, *_: Any) -> Iterable[Message]:
        raise NotImplementedError("not watched")

    def aggregate_evaluate(self, *_: Any) -> Any:
        raise NotImplementedError("not watched")

    def summary(self) -> None:
        raise NotImplementedError("not watched")


def _found(path: Path) -> Path:
    """Return where a user's file lies: in the working folder, or beside the program's modules."""
    folders = [Path.cwd(), *(Path(entry or ".") for entry in sys.path)]
    places = [path] if path.is_absolute() else [folder / path for folder in folders]
    for place in places:
        if place.is_file():
            return place.absolute()
    raise ConfigError(f"client is {path}: no such file in the working folder or beside the program")

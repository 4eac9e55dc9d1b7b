"""The ServerApp: read the config, train, attack what was seen, close the log."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Result, Strategy
from flwr.superlink.grid import InMemoryGrid
from rich.console import Console
from rich.markup import escape
from torch import nn

from client_app.defended_steps import check_defense
from client_app.training import check_training
from fl_app.audit.auditor import Auditor
from fl_app.audit.on_line import load_on_line, told_lines
from fl_app.audit.table import leakage_table
from fl_app.config import Config, ConfigError, load_config
from fl_app.data import DataError, check_test, dataset_info, load_partition
from fl_app.models import known_model
from fl_app.models.norms import batch_norms
from fl_app.protocol import Knowledge, Observation
from fl_app.report.writing import try_report
from fl_app.runs.attacking import AttackProcess, open_pool
from fl_app.runs.facts import prior_saw, run_facts
from fl_app.runs.folder import anchored, create_run
from fl_app.runs.lock import only_one
from fl_app.runs.states import ModelStore, find_state, load_state
from fl_app.util.files import RUNS_DIR, runs_folder, write_text
from fl_app.util.origin import RUNS, origin
from fl_app.util.ray_guard import UnguardedRayError, check_guarded
from fl_app.util.text import reason
from server_strategies.attack_pool import Job, enqueue
from server_strategies.attacks.run import create_attack
from server_strategies.checkpointing import Checkpointing
from server_strategies.honest_but_curious import HonestButCurious
from server_strategies.observations import MOST_IMAGES, ObservationStore
from server_strategies.priors.flow import load_flow
from server_strategies.recorder import Recorder
from server_strategies.valid_replies import Expected, ValidReplies

app = ServerApp()
_log = logging.getLogger("flwr")  # Flower streams it to the user

_LOG_WIDTH = 140  # Flower streams the output as a log, where rich would assume 80 columns

_PATIENCE = 30.0  # seconds without another node connecting, before too few is an error


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one audit."""
    console = Console()
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    try:
        simulated = isinstance(grid, InMemoryGrid)
        config, knowledge, model = _prepare(context.run_config, simulated)
        facts = run_facts(config, knowledge, simulated)
        wait_for_nodes(grid, config.num_clients)
        run_dir = create_run(config, facts)
    except (ConfigError, DataError, UnguardedRayError, OSError) as error:
        words = f"[bold red]Nothing was started:[/] {escape(str(error))}"
        console.print(words, highlight=False, soft_wrap=True)
        raise
    for notice in (f"Run folder: {run_dir}", *_notices(config, context.run_id, simulated)):
        console.print(notice, highlight=False, soft_wrap=True, markup=False)
    console.print(_truth_notice(config, run_dir, context.run_id), highlight=False, soft_wrap=True)
    with told_lines(config.audit.on_line) as on_line:
        auditor = Auditor(run_dir, config, knowledge, on_line=on_line)
        if simulated:
            trained = _audit_in_simulation(grid, auditor, model, console)
        else:
            trained = _audit_in_deployment(grid, auditor, model, console)
    lines = auditor.lines()
    _tell(console, run_dir, lines, try_report(run_dir))
    unwatched = _unwatched(config, lines)
    if unwatched:
        console.print(unwatched, style="bold red", highlight=False, soft_wrap=True, markup=False)
    if not trained:
        why = next((line["error"] for line in lines if line["error"]), "see the log above")
        raise RuntimeError(f"no client trained in any round: {why}")


def _prepare(
    run_config: Mapping[str, Any], simulated: bool
) -> tuple[Config, Knowledge, ArrayRecord]:
    """Refuse what can't work, before anything starts."""
    config = anchored(load_config(run_config).settled(simulated))
    attack = create_attack(config.attack)
    if config.audit.on_line:
        load_on_line(config.audit.on_line)
    info = dataset_info(config.dataset)
    if attack.needs_prior:
        try:
            load_flow(attack.weights(config.prior.weights))
        except ValueError as error:
            raise ConfigError(f"prior.weights: {error}") from error
    try:
        model = known_model(config.knowledge(info), config.seed)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    try:
        check_training(config.client, model, info.num_classes)
    except ValueError as error:
        raise ConfigError(f"client.{error}") from error
    try:
        check_defense(config.defense, config.client, model)
    except ValueError as error:
        raise ConfigError(f"defense.{error}") from error
    _check_statistics(model, config)
    if simulated:
        _check_watch(config)
        check_guarded()
        # Every client would find the same fault.
        load_partition(config.dataset, 0, config.num_clients, config.seed)
        if config.strategy.fraction_evaluate:
            check_test(config.dataset, config.num_clients)
    weights = model.state_dict()
    if config.start_from:
        path = find_state(config.start_from, runs_folder(config.runs_dir))
        shape = "x".join(map(str, info.image_shape))
        words = f"{config.model.name} for {info.num_classes} classes of {shape} images"
        weights = load_state(path, weights, words)
    return config, config.knowledge(info), ArrayRecord(weights)


def _check_statistics(model: nn.Module, config: Config) -> None:
    """Refuse a server optimiser that would step BatchNorm's running variances below zero."""
    sent = config.client.batch_norm == "train" and config.client.send_buffers
    if config.strategy.name != "fedavg" and sent and any(batch_norms(model)):
        raise ConfigError(
            f"strategy.name is {config.strategy.name!r}, which steps BatchNorm's running variances "
            "as if they were weights; allowed with them: fedavg, or client.send_buffers=false, or "
            "another model.norm"
        )


def _check_watch(config: Config) -> None:
    """Refuse to watch a client that a simulation does not have: it has 0 to num_clients - 1."""
    watched = config.watch.clients
    if not isinstance(watched, list) or config.defense.secagg:
        return
    unknown = [client for client in watched if client >= config.num_clients]
    if unknown:
        raise ConfigError(
            f"watch.clients holds {unknown[0]}; allowed with num_clients={config.num_clients}: "
            f"0 to {config.num_clients - 1}, or all"
        )


def _notices(config: Config, run_id: int, simulated: bool) -> list[str]:
    """Return what is to be known of a run when it starts."""
    doubt = origin().doubt
    uncertain = doubt and not (origin().runs and config.runs_dir == RUNS_DIR)
    notices = [notice] if (notice := _prior_notice(config)) else []
    if uncertain and not Path(config.runs_dir).expanduser().is_absolute():
        notices.append(f"{doubt}. To be sure: --stream, {RUNS}, or runs_dir with its whole path")
    stop = f"flwr stop {run_id} {'local-simulation' if simulated else '<as in flwr run>'}"
    notices.append(f"Ctrl-C of flwr run does not end the audit; this does: {stop}")
    return notices


def _prior_notice(config: Config) -> str:
    """Return that the prior saw images like the clients'; "": it did not, or is not used."""
    attack = create_attack(config.attack)
    weights = attack.weights(config.prior.weights)
    if not attack.needs_prior or not prior_saw(load_flow(weights), config.dataset):
        return ""
    return (
        f"The prior {weights} was trained on images of {config.dataset.name}'s train "
        "split, which clients hold: figures are optimistic. dataset.split=test audits others"
    )


def _truth_notice(config: Config, run_dir: Path, run_id: int) -> str:
    if config.audit.truth:
        return f"Truth is on: clients leave their private images in {run_dir / 'truth'}"
    return (
        "Truth is off: the scores are those that need none, and the labels are the attack's own. "
        f"Bring it later with flowleak score {run_dir.name} --truth PATH (Flower run {run_id})"
    )


def wait_for_nodes(grid: Grid, num_clients: int, patience: float = _PATIENCE) -> None:
    """Wait until every client is connected.

    Flower's strategies would wait for missing clients for ever.

    Parameters
    ----------
    grid : Grid
    num_clients : int
        Clients that the configuration expects, one a partition.
    patience : float
        Seconds to wait after the last change.

    Raises
    ------
    ConfigError
        If there are more or, after `patience`, fewer clients.
    """
    connected, since = -1, time.monotonic()
    while connected != num_clients:
        now = len(list(grid.get_node_ids()))
        if now != connected:
            connected, since = now, time.monotonic()
        elif connected > num_clients or time.monotonic() - since > patience:
            raise ConfigError(
                f"num_clients is {num_clients}, but {connected} clients are connected; set "
                f"overrides='num_clients={connected}', or in a simulation add "
                f"--federation-config 'num-supernodes={num_clients}' to flwr run"
            )
        else:
            time.sleep(0.2)


def create_strategy(config: Config) -> Strategy:
    """Return the strategy that the curious server runs honestly, with all clients in each round.

    All that are connected: a client that dies is missing from then on, and back
    in the round after it returns.
    """
    kinds: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedadam": FedAdam}
    inner = kinds[config.strategy.name](
        fraction_evaluate=config.strategy.fraction_evaluate,
        min_train_nodes=1,
        min_available_nodes=1,
        min_evaluate_nodes=1,
    )
    train = frozenset({"loss", "epsilon"} if config.defense.dp_clip else {"loss"})
    return ValidReplies(
        inner,
        train=Expected(train, config.most_examples),
        evaluate=Expected(frozenset({"loss", "accuracy"}), config.strategy.max_examples),
    )


def _audit_in_simulation(
    grid: Grid, auditor: Auditor, model: ArrayRecord, console: Console
) -> bool:
    """Attack in the simulation's own Ray; return whether any round could be aggregated."""
    store, config = ObservationStore(auditor.run_dir), auditor.config
    with only_one(auditor.run_dir), open_pool(auditor) as pool:

        def record(observation: Observation) -> None:
            knowledge = auditor.grant(observation)
            store.save(observation)
            pool.submit(Job(observation, knowledge, config.attack, config.prior, config.seed))

        trained = _train(grid, auditor, model, record)
        pool.drain(console)
    return trained


def _audit_in_deployment(
    grid: Grid, auditor: Auditor, model: ArrayRecord, console: Console
) -> bool:
    """Attack in a process beside the training; return whether any round could be aggregated."""
    store, config = ObservationStore(auditor.run_dir), auditor.config
    attacks = AttackProcess(
        auditor.run_dir,
        lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False),
        config.audit.on_line,
    )

    def record(observation: Observation) -> None:
        store.save(observation)
        # What the attack may know is granted where it runs.
        job = Job(observation, auditor.knowledge, config.attack, config.prior, config.seed)
        enqueue(auditor.run_dir, job)

    trained = False
    try:
        trained = _train(grid, auditor, model, record)
    finally:
        left = attacks.drain()
    if left:
        console.print(
            f"The attacks' process failed: {left}. The rest is in the queue: "
            f"flowleak attack {auditor.run_dir.name}",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
    return trained


def _train(
    grid: Grid, auditor: Auditor, model: ArrayRecord, record: Callable[[Observation], None]
) -> bool:
    """Run all rounds and hand out what was seen; return whether any could be aggregated."""
    config = auditor.config
    models = ModelStore(auditor.run_dir, config.checkpoints)
    with Recorder(record, auditor.record_skipped) as recorder:

        def on_observation(observation: Observation) -> None:
            _check_size(observation)
            recorder.add(observation)

        strategy = HonestButCurious(
            Checkpointing(create_strategy(config), models.save),
            watch=config.watch,
            on_observation=on_observation,
            on_skipped=auditor.record_skipped,
            seed=config.seed,
            # Only in an audit are clients told where to leave their private batches.
            settings={"audit-dir": str(auditor.run_dir)} if config.audit.truth else None,
            secagg=config.defense.secagg,
            most_examples=config.most_examples,
        )
        known = auditor.knowledge
        data = {
            "mean": list(known.mean),
            "std": list(known.std),
            "classes-and-shape": [known.num_classes, *known.image_shape],
        }
        result = strategy.start(
            grid=grid,
            initial_arrays=model,
            num_rounds=config.rounds,
            train_config=ConfigRecord(dict(data)),  # type: ignore[arg-type]
            evaluate_config=ConfigRecord(dict(data)),  # type: ignore[arg-type]
        )
    _save_training(auditor.run_dir, result)
    return bool(result.train_metrics_clientapp)


def _check_size(observation: Observation) -> None:
    """Refuse more images than any attack takes, before one allocates them."""
    if observation.num_examples > MOST_IMAGES:
        raise ValueError(
            f"num-examples is {observation.num_examples}; no attack takes more than {MOST_IMAGES}"
        )


def _save_training(run_dir: Path, result: Result) -> None:
    """Save each round's metrics."""
    rounds = [
        {
            "round": round_,
            "train": dict(result.train_metrics_clientapp.get(round_, {})),
            "evaluate": dict(result.evaluate_metrics_clientapp.get(round_, {})),
        }
        for round_ in sorted(
            result.train_metrics_clientapp.keys() | result.evaluate_metrics_clientapp.keys()
        )
    ]
    try:
        write_text(run_dir / "training.json", json.dumps(rounds, indent=2))
    except OSError as error:  # the training is done, and its updates are to be attacked
        _log.warning("the metrics by round are not kept: %s", reason(error))


def _unwatched(config: Config, lines: list[dict[str, Any]]) -> str:
    """Return which clients were to be watched and never were, in words; "": none."""
    if not lines:
        return "NOTHING WAS WATCHED: no update of a watched client and round arrived"
    ids = config.watch.clients
    if not isinstance(ids, list) or config.defense.secagg:
        return ""
    seen = {line["client"] for line in lines} | {int(line["node"]) for line in lines}
    missing = [str(client) for client in ids if client not in seen]
    return f"NEVER WATCHED: client {', '.join(missing)} sent no update" if missing else ""


def _tell(
    console: Console, run_dir: Path, lines: list[dict[str, Any]], report: Path | None
) -> None:
    """Print what leaked, and where it lies."""
    console.print(leakage_table(lines))
    picture = next((run_dir / line["picture"] for line in lines if line["picture"]), None)
    found = {"Leakage log": run_dir / "leakage.jsonl", "A picture": picture, "Report": report}
    for name, path in found.items():
        if path:
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)

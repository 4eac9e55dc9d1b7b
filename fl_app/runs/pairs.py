"""One update from two files of weights: recorded as a run of its own, and attacked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from fl_app.audit.auditor import Auditor
from fl_app.audit.on_line import OnLine
from fl_app.audit.truth import Truth, check_truth, write_truth
from fl_app.config import AttackConfig, AuditConfig, Config, ConfigError, load_config
from fl_app.protocol import Client, Knowledge, Observation
from fl_app.runs.attacking import PLAIN, tell_forecast
from fl_app.runs.described import create_described_run, load_client
from fl_app.runs.facts import described_auditor
from fl_app.runs.weights import observed, read_weights, replies
from fl_app.util.files import user_path
from fl_app.util.machine import device
from fl_app.util.reading import BrokenFileError, check_regular
from server_strategies.attacks.run import run_attack
from server_strategies.observations import MOST_IMAGES, ObservationStore


@dataclass(frozen=True)
class Pair:
    """What a user says of one update.

    Attributes
    ----------
    before, after : Path
        The weights that the client was sent, and those that it returned, see `read_weights`.
        Folders stand for several clients of one round, see `replies`.
    client : Path
        The file that describes the client, see `load_client`.
    examples : int
        Images that it trained on; 0: as the description says.
    truth : Path or None
        A file of its private images, see `read_private`, for scores.
    labels : {"by-step", "counts", "unknown"}
        What the attack is granted of their labels.
    """

    before: Path
    after: Path
    client: Path
    examples: int = 0
    truth: Path | None = None
    labels: str = "unknown"


def attack_pair(
    pair: Pair,
    attack: AttackConfig,
    out: Path,
    console: Console,
    lpips_weights: str = "",
    on_line: OnLine | None = None,
) -> Auditor:
    """Record an update as a run, attack it in this process, and log what leaked.

    Of several clients each is attacked; one that can't be has a line that says why.

    Parameters
    ----------
    pair : Pair
    attack : AttackConfig
    out : Path
        The run's folder; a number is added where it is taken.
    console : Console
        Shows how far the attack is.
    lpips_weights : str
        As ``audit.lpips_weights``.
    on_line : OnLine, optional
        See `Auditor`.

    Returns
    -------
    Auditor
        Of the run, which has its line.

    Raises
    ------
    ConfigError, ValueError
        If the files or the description can't be used; nothing is written then.
    """
    client = load_client(pair.client)
    examples = pair.examples or client.examples
    if not 1 <= examples <= MOST_IMAGES:
        raise ConfigError(
            f"examples is {examples}; needed: the images that the client trained on, 1 to "
            f"{MOST_IMAGES}, by --examples or in {pair.client}"
        )
    known = client.knowledge
    files = replies(pair.before, pair.after)
    if pair.truth and len(files) > 1:
        raise ConfigError(f"truth is {pair.truth}; allowed for {len(files)} clients: none")
    seen = [
        observed(read_weights(before), read_weights(after), examples, known, node=number)
        for number, (before, after) in enumerate(files)
    ]
    truth = read_private(pair.truth, client, examples) if pair.truth else None
    config = _config(pair, attack, out, lpips_weights)
    run_dir = create_described_run(config, client, str(pair.client.absolute()))
    store = ObservationStore(run_dir)
    for each in seen:
        store.save(each)
    if truth:
        write_truth(run_dir, truth)
    auditor = described_auditor(run_dir, config, client, on_line=on_line)
    tell_forecast(seen[0], known, attack, console)
    for each, (_, after) in zip(seen, files, strict=True):
        if len(seen) > 1:
            console.print(f"client {each.node}: {after}", **PLAIN)
        try:
            _attack(each, auditor.grant(each), auditor, console)
        except (ValueError, RuntimeError):
            if len(seen) == 1:
                raise
    return auditor


def _config(pair: Pair, attack: AttackConfig, out: Path, lpips_weights: str) -> Config:
    if pair.labels != "unknown" and not pair.truth:
        raise ConfigError(f"labels is {pair.labels!r}; allowed without --truth: unknown")
    where = user_path(str(out))
    audit = AuditConfig(bool(pair.truth), pair.labels, lpips_weights=lpips_weights)
    defaults = load_config({})
    return replace(
        defaults, name=where.name, runs_dir=str(where.parent), attack=attack, audit=audit
    )


def _attack(seen: Observation, known: Knowledge, auditor: Auditor, console: Console) -> None:
    config = auditor.config
    columns = (TextColumn("attack"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=config.attack.iterations)

        def report(iteration: int, loss: float) -> None:
            progress.update(bar, completed=iteration, description=f"loss {loss:.4f}")

        try:
            found = run_attack(seen, known, config.attack, config.prior, config.seed, report)
        except (ValueError, RuntimeError) as error:
            auditor.record_failure(seen, config.attack.name, str(error))
            raise
    auditor.record(seen, found, device=device())


def read_private(path: Path, client: Client, examples: int) -> Truth:
    """Return a client's private images, as a user has saved them, for scores.

    Parameters
    ----------
    path : Path
        A ``.pt`` file that holds ``images``, shape (N, C, H, W), uint8 or in [0, 1], before
        normalisation, and ``labels``, shape (N,). Training order, if the labels by step are
        granted; otherwise any.
    client : Client
    examples : int
        N.

    Raises
    ------
    BrokenFileError
        If it can't be read, or can't be the update's.
    """
    check_regular(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        images, labels = held["images"], held["labels"]
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise TypeError("images and labels are not tensors")
    except Exception as error:  # torch.load raises nearly anything
        raise BrokenFileError(
            f"{path} can't be read: {error}; needed: torch.save({{'images': ..., 'labels': ...}})"
        ) from error
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if images.dim() != 4 or not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise BrokenFileError(f"{path} holds no images in [0, 1] of shape (N, C, H, W)")
    truth = Truth(
        images, tuple(labels.long().tolist()), client.training.batches(examples), round=1, node=0
    )
    try:
        check_truth(truth, client.knowledge, client.training, examples)
    except ValueError as error:
        raise BrokenFileError(f"{path} is not of this update: {error}") from error
    return truth

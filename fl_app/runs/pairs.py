"""Updates from files of weights: recorded as a run of their own, and attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from fl_app.audit.auditor import Auditor
from fl_app.audit.on_line import OnLine
from fl_app.audit.truth import Truth, check_truth, write_truth
from fl_app.config import (
    AttackConfig,
    AuditConfig,
    Config,
    ConfigError,
    load_config,
    read_settings,
)
from fl_app.protocol import Client, Knowledge, Observation
from fl_app.runs.attacking import PLAIN, tell_forecast
from fl_app.runs.described import REPLIES, client_of, create_described_run, load_client
from fl_app.runs.facts import described_auditor
from fl_app.runs.folder import DESCRIBED
from fl_app.runs.weights import observed, read_weights, replies
from fl_app.util.files import user_path
from fl_app.util.machine import device
from fl_app.util.reading import BrokenFileError, check_regular
from server_strategies.attacks.run import run_attack
from server_strategies.observations import MOST_IMAGES, ObservationStore


@dataclass(frozen=True)
class Pair:
    """What a user says of the updates in files.

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
        A file of its private images, see `read_private`, for scores; of several clients a folder,
        see `private_file`.
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

    Of several clients each is attacked; one that can't be has a line that says why, and one whose
    file can't be used is named and left out.

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
    seen = _read(files, examples, known, console)
    names = {each.node: files[each.node][1].name for each in seen}
    named = [(each, names[each.node]) for each in seen]
    truths = _truths(pair.truth, client, named, console) if pair.truth else []
    config = _config(pair, attack, out, lpips_weights)
    run_dir = create_described_run(config, client, str(pair.client.absolute()), names)
    store = ObservationStore(run_dir)
    for each in seen:
        store.save(each)
    for truth in truths:
        write_truth(run_dir, truth)
    auditor = described_auditor(run_dir, config, client, on_line=on_line)
    tell_forecast(seen[0], known, attack, console)
    for each in seen:
        if len(files) > 1:
            console.print(f"client {each.node}: {names[each.node]}", **PLAIN)
        try:
            _attack(each, auditor.grant(each), auditor, console)
        except (ValueError, RuntimeError):
            if len(files) == 1:
                raise
    return auditor


def _read(
    files: Sequence[tuple[Path, Path]], examples: int, known: Knowledge, console: Console
) -> list[Observation]:
    """Return the updates in pairs of files; of several, one that can't be used is named."""
    seen, problem = [], ValueError("no update")
    for number, (before, after) in enumerate(files):
        try:
            weights = read_weights(before), read_weights(after)
            seen.append(observed(*weights, examples, known, node=number))
        except ValueError as error:
            problem = error
            if len(files) > 1:
                why = f"Left out: {after.name}: {error}"
                console.print(why, style="yellow", **PLAIN)
    if not seen:
        raise problem
    return seen


def _truths(
    path: Path,
    client: Client,
    named: Sequence[tuple[Observation, str]],
    console: Console,
) -> list[Truth]:
    """Return the private images of updates; of several, one without a file that fits is named."""
    if len(named) > 1 and not path.is_dir():
        such = ", ".join(Path(name).with_suffix(".pt").name for _, name in named[:2])
        raise ConfigError(
            f"truth is {path}; allowed for {len(named)} updates: a folder with a file for each, "
            f"such as {such}"
        )
    truths = []
    for each, name in named:
        try:
            file = private_file(path, name)
            truth = read_private(file, client, each.num_examples)
        except BrokenFileError as error:
            if not path.is_dir():
                raise
            console.print(f"Not scored: {error}", style="yellow", **PLAIN)
        else:
            truths.append(replace(truth, round=each.round, node=each.node))
    return truths


def take_private(run_dir: Path, path: Path, file: Path | None, console: Console) -> None:
    """Write the private images in a user's files into a run of its clients, for scores.

    Parameters
    ----------
    run_dir : Path
        A run from files, or a recorded federation of the user's own.
    path : Path
        As `Pair.truth`. The files of a recorded federation are named by their update, as those in
        ``observations/`` are: ``round-NNNN-node-ID.pt``.
    file : Path or None
        That describes the clients, see `client_of`.
    console : Console
        Names what can't be used.

    Raises
    ------
    ConfigError, BrokenFileError
        If no file describes the run's clients, or the one file can't be used.
    """
    described = read_settings(run_dir / "config.yaml").get(DESCRIBED)
    if not isinstance(described, Mapping):
        raise ConfigError(
            f"truth is {path}; allowed for {run_dir.name}, whose clients are flowleak's own: a "
            "folder that holds truth/, as clients write it"
        )
    store = ObservationStore(run_dir)
    seen = [store.load(id_) for id_ in store.ids()]
    names = described.get(REPLIES)
    replies_ = {str(node): str(name) for node, name in names.items()} if names else {}
    named = [(each, replies_.get(str(each.node), each.id)) for each in seen]
    for truth in _truths(path, client_of(described, file), named, console):
        write_truth(run_dir, truth)


def private_file(path: Path, reply: str) -> Path:
    """Return the file of a client's private images.

    Parameters
    ----------
    path : Path
        It, or a folder that holds it under the name of the client's reply.
    reply : str
        Or what else names the update.

    Raises
    ------
    BrokenFileError
        If a folder lacks it.
    """
    if not path.is_dir():
        return path
    for file in (path / reply, (path / reply).with_suffix(".pt")):
        if file.is_file():
            return file
    raise BrokenFileError(f"{path} holds no private images of {reply}")


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

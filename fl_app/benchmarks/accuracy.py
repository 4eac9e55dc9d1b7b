"""What a defence costs: the accuracy of a federation's model, with it and without."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from client_app.defenses import defended_weights, noise_generator
from client_app.training import NO_DEFENSE, choose_batches, evaluate, local_seed, train
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.processes import in_processes
from fl_app.benchmarks.rows import Row, commits, kept_results, with_commit
from fl_app.benchmarks.suite import Setting
from fl_app.data import ImageSet, load_split
from fl_app.models import create_model
from fl_app.protocol import DatasetInfo, Defense, LocalTraining
from fl_app.util.files import write_text
from server_strategies.updates import weighted_mean


@dataclass(frozen=True)
class Federation:
    """A federation that is trained to see how good its model gets.

    Attributes
    ----------
    training : LocalTraining
        Of every client.
    defense : Defense
        What every client does to its update.
    clients : int
        They share the training images equally, and all train in every round.
    rounds : int
        Of federated averaging.
    images : int
        Training images of all clients together; all there are, if those are fewer.
    model : str
        A name in the registry of models.
    """

    training: LocalTraining
    defense: Defense = NO_DEFENSE
    clients: int = 10
    rounds: int = 5
    images: int = 20_000
    model: str = "convnet"

    @property
    def name(self) -> str:
        """Everything that decides the result but data and seed."""
        t = self.training
        local = f"K={t.local_steps}" if t.local_steps else f"{t.local_epochs} epochs"
        client = f"{t.optimizer} {t.lr:g} {local} B={t.batch_size}"
        size = f"{self.clients} clients, {self.rounds} rounds, {self.images} images"
        return f"{self.model}, {client}, {size}, {self.defense}"


def federated_accuracy(
    federation: Federation, train_set: ImageSet, test_set: ImageSet, info: DatasetInfo, seed: int
) -> float:
    """Return the test accuracy of FedAvg's global model after the last round, in [0, 1].

    A loop in this process over what a Flower client does: `choose_batches`, `train`,
    `defended_weights`, seeded alike; then the mean of the clients' weights. Two federations
    that differ in their defence alone train on the same batches.

    Parameters
    ----------
    federation : Federation
    train_set : ImageSet
        The first `Federation.images` of a seeded shuffle are the clients'.
    test_set : ImageSet
    info : DatasetInfo
    seed : int
        >= 0; decides the model, the clients' images, their batches and their noise.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(train_set), generator=generator)[: federation.images]
    shares = [picks[client :: federation.clients] for client in range(federation.clients)]
    model = create_model(
        federation.model,
        info.num_classes,
        info.image_shape,
        seed,
        precode=federation.defense.precode,
        dropout=federation.defense.dropout,
    )
    weights = _copy(model.state_dict())
    for round_ in range(1, federation.rounds + 1):
        sent = []
        for client, share in enumerate(shares):
            model.load_state_dict(weights)
            own = ImageSet(train_set.images[share], train_set.labels[share])
            place = (seed, client, round_)
            sent.append(_train_client(federation, model, weights, own, info, place))
        weights = weighted_mean([w1 for w1, _ in sent], [count for _, count in sent])
    model.load_state_dict(weights)
    return evaluate(model, test_set, info.mean, info.std)[1]


def _train_client(
    federation: Federation,
    model: torch.nn.Module,
    weights: Mapping[str, Tensor],
    own: ImageSet,
    info: DatasetInfo,
    place: tuple[int, int, int],
) -> tuple[dict[str, Tensor], int]:
    """Return what a client sends, of seed, client and round `place`: weights and num-examples."""
    seed = local_seed(*place)
    batches = choose_batches(len(own), federation.training, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train(
            model, own.images.float() / 255, own.labels, batches, federation.training,
            info.mean, info.std, federation.defense,
        )  # fmt: skip
    noise = noise_generator(*place)
    sent = defended_weights(weights, _copy(model.state_dict()), federation.defense, noise)
    return sent, len(torch.cat(batches).unique())


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def federation_of(case: Case) -> Federation | None:
    """Return the federation whose accuracy says what a case's defence costs.

    Its clients train as the case's, but for whole epochs in batches of 32, or nothing
    would be learnt in a few rounds. None for Soteria, which takes hundreds of
    backward passes a step.
    """
    if case.defense.soteria:
        return None
    training = replace(case.training, batch_size=32, local_steps=0, local_epochs=1, reshuffle=True)
    return Federation(training, case.defense, model=case.model)


@dataclass(frozen=True)
class Accuracies:
    """What federations reached.

    Attributes
    ----------
    reached : mapping
        By `Federation.name`: the accuracy in [0, 1] by seed.
    """

    reached: Mapping[str, Mapping[int, float]]

    def of(self, case: Case) -> Mapping[int, float]:
        """Return the accuracy in [0, 1] by seed; nothing where it was not measured."""
        federation = federation_of(case)
        return self.reached.get(federation.name, {}) if federation else {}


def measure_accuracies(cases: Iterable[Case], setting: Setting, console: Console) -> Accuracies:
    """Train each defence's federation and its undefended counterpart on the same seeds.

    As many of each as its case says (`Case.federations`), without those that the file beside
    `setting.path` (``.accuracy.json``) holds; none where `setting.trials` is 0. The file is
    written after each.

    Parameters
    ----------
    cases : iterable of Case
    setting : Setting
    console : Console
        Shows the progress.

    Raises
    ------
    ValueError
        If the file holds results of other facts.
    """
    path = setting.path.with_suffix(".accuracy.json") if setting.path else None
    if not setting.trials:
        return _accuracies(_kept_rows(path, setting.facts, beside=("images",)))
    train_set = load_split(setting.data, "train")
    facts = {**setting.facts, "images": len(train_set)}
    rows = _kept_rows(path, facts)
    done = {(row["federation"], row["seed"]) for row in rows}
    todo = [
        (federation, seed)
        for federation, seed in _wanted(cases, setting.seed)
        if (federation.name, seed) not in done
    ]
    if todo:
        data = train_set, setting.images, setting.info
        for row in in_processes(_measure, data, todo, setting.workers, "accuracy", console):
            rows.append(with_commit(row, facts))
            if path:
                content = {"facts": {**facts, "commit": commits(rows)}, "rows": rows}
                write_text(path, json.dumps(content, indent=1) + "\n")
    return _accuracies(rows)


def _kept_rows(
    path: Path | None, facts: Mapping[str, Any], beside: tuple[str, ...] = ()
) -> list[Row]:
    return kept_results(path, facts, beside)["rows"] if path and path.exists() else []


def _wanted(cases: Iterable[Case], seed: int) -> list[tuple[Federation, int]]:
    """Return the federations of all cases with their seeds, each once, seed by seed."""
    wanted: dict[tuple[str, int], Federation] = {}
    for case in cases:
        federation = federation_of(case)
        if not federation:
            continue
        for number in range(seed, seed + case.federations):
            for each in (replace(federation, defense=NO_DEFENSE), federation):
                wanted[each.name, number] = each
    by_seed = sorted(wanted.items(), key=lambda item: item[0][1])
    return [(federation, number) for (_, number), federation in by_seed]


def _accuracies(rows: Iterable[Row]) -> Accuracies:
    reached: dict[str, dict[int, float]] = {}
    for row in rows:
        reached.setdefault(row["federation"], {})[row["seed"]] = row["accuracy"]
    return Accuracies(reached)


def _measure(
    data: tuple[ImageSet, ImageSet, DatasetInfo], federation: Federation, seed: int
) -> Row:
    accuracy = federated_accuracy(federation, *data, seed)
    return {"federation": federation.name, "seed": seed, "accuracy": accuracy}

"""What a defence costs: the accuracy of a federation's model, with it and without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from client_app.training import NO_DEFENSE, evaluate
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.federation import Federation, global_models
from fl_app.benchmarks.processes import in_processes
from fl_app.benchmarks.rows import (
    Row,
    file_beside,
    keep_results,
    kept_results,
    made_by,
    with_facts,
)
from fl_app.benchmarks.suite import Setting
from fl_app.data import ImageSet, load_split
from fl_app.protocol import DatasetInfo

_IMAGES = 20_000  # of all clients together
_ROUNDS, _SAMPLED = 200, 10  # rounds, and clients that train in each


def federated_accuracy(
    federation: Federation, train_set: ImageSet, test_set: ImageSet, info: DatasetInfo, seed: int
) -> float:
    """Return the test accuracy of FedAvg's global model after the last round, in [0, 1].

    Parameters
    ----------
    federation : Federation
        Of one round or more.
    train_set, test_set : ImageSet
    info : DatasetInfo
    seed : int
        See `global_models`.
    """
    *_, weights = global_models(federation, train_set, info, seed)
    model = federation.create(info, seed)
    model.load_state_dict(dict(weights))
    return evaluate(model, test_set, info.mean, info.std)[1]


def federation_of(case: Case) -> Federation | None:
    """Return the federation whose accuracy says what a case's defence costs.

    Its clients are the case's: as many images each, trained on alike. None for Soteria, which
    takes hundreds of backward passes a step.
    """
    if case.defense.soteria:
        return None
    return Federation(
        case.training,
        case.defense,
        clients=_IMAGES // case.count,
        rounds=_ROUNDS,
        images=_IMAGES,
        model=case.model,
        norm=case.norm,
        head=case.head,
        sampled=_SAMPLED,
    )


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
    path = file_beside(setting.path, ".accuracy.json") if setting.path else None
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
            rows.append(with_facts(row, facts))
            if path:
                keep_results(path, {"facts": {**facts, **made_by(rows)}, "rows": rows})
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

"""The benchmark `flowleak bench diagnosis`: false alarms of healthy clients, and faults found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from client_app.defenses import clip, sparsify
from client_app.training import NO_DEFENSE
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import Clients
from fl_app.benchmarks.common import ADAM, SGD
from fl_app.benchmarks.rows import Row
from fl_app.benchmarks.suite import ReadingSuite, Setting
from fl_app.config import AttackConfig
from fl_app.protocol import Defense, Knowledge, LocalTraining, Observation, ParameterGroup
from server_strategies.attacks.diagnosis import diagnose
from server_strategies.attacks.matching import matching_objective

_END = 0.1
"""Matching loss at the end that is said: of an attack that went well, and still in doubt."""

_DEPENDS = "hardly depends on the images"  # true of some healthy clients


# --- models as users write them, for images of 32x32 ----------------------------------------


def batch_norm_cnn() -> nn.Module:
    """Return two convolutions with BatchNorm and a hidden layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def sigmoid_lenet() -> nn.Module:
    """Return LeNet with sigmoid, as in the first attacks' papers, but torch's initialisation."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5),
        nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(576, 120), nn.Sigmoid(),
        nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp_3() -> nn.Module:
    """Return a perceptron of three layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
        nn.Linear(200, 10),
    )  # fmt: skip


def group_norm_cnn() -> nn.Module:
    """Return two convolutions with GroupNorm and SiLU, then the mean over places."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def tutorial_cnn() -> nn.Module:
    """Return the network of Flower's and torch's quickstarts."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


# --- faults ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that a client does and the protocol does not say.

    Attributes
    ----------
    words : str
        Found in the sentence that tells it.
    training : callable
        What the client does in the place of its training, by the names of its weights.
    update : callable
        What it makes of its update, by name.
    defense : Defense
    optimizer : str
        Of the clients that can have it; "": of all.
    models : tuple of callable
        That can have it; (): all.
    """

    words: str
    training: Callable[[LocalTraining, list[str]], LocalTraining] = lambda training, names: training
    weights: Callable[[Observation], Observation] = lambda seen: seen
    defense: Defense = NO_DEFENSE
    optimizer: str = ""
    models: tuple[Callable[[], nn.Module], ...] = ()


def _changed(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Callable[[Observation], Observation]:
    """Return what makes of an observation one of a changed update."""

    def changed(seen: Observation) -> Observation:
        update = change(seen.update)
        moved = {name: seen.w0[name] + part for name, part in update.items()}
        return replace(seen, w1={**seen.w1, **moved})

    return changed


def _in_bf16(seen: Observation) -> Observation:
    rounded = {name: seen.w1[name].bfloat16().float() for name in seen.trained}
    return replace(seen, w1={**seen.w1, **rounded})


def _clamped(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return clip(update, 0.1 * max(part.abs().max().item() for part in update.values()), "value")


def _first(names: list[str]) -> str:
    return f"{names[0].rpartition('.')[0]}."


FAULTS = {
    "weights in bf16": Fault("rounded to bfloat16", weights=_in_bf16),
    "noise, 0.1 rms": Fault(
        "carries noise", defense=Defense(noise="gaussian", sigma=0.1, relative=True)
    ),
    "70% sparsified": Fault("sparsified", weights=_changed(lambda update: sparsify(update, 0.7))),
    "clamped to 0.1 of the largest": Fault("clamped", weights=_changed(_clamped)),
    "Adam, not SGD": Fault(
        "not as by sgd",
        lambda training, _: replace(training, optimizer="adam", lr=ADAM.lr),
        optimizer="sgd",
    ),
    "SGD, not Adam": Fault(
        "not adam's",
        lambda training, _: replace(training, optimizer="sgd", lr=SGD.lr),
        optimizer="adam",
    ),
    "first layer frozen": Fault(
        "did not change, though",
        lambda training, names: replace(
            training, trainable=tuple(n for n in names if not n.startswith(_first(names)))
        ),
    ),
    "first layer at 0.01 lr": Fault(
        "times shorter",
        lambda training, names: replace(
            training, groups=(ParameterGroup(f"{_first(names)}*", training.lr / 100),)
        ),
    ),
    "BatchNorm in evaluation mode": Fault(
        "trained in evaluation mode",
        lambda training, _: replace(training, batch_norm="eval"),
        models=(batch_norm_cnn,),
    ),
}
"""Planted in clients of `PLANTED`, of K = 5."""

PLANTED = ("convnet", batch_norm_cnn)
MODELS = (
    "convnet", "mlp", "lenet5", "vgg11", "resnet8",
    batch_norm_cnn, sigmoid_lenet, mlp_3, group_norm_cnn, tutorial_cnn,
)  # fmt: skip

_COLUMNS = ("client", "planted", "clients", "told", "asked", "hardly depends", "s")


class _Diagnosis(ReadingSuite):
    def trial(self, case: Case, seed: int, clients: Clients, setting: Setting) -> list[Row]:
        """Return a row of the healthy client, and one of each fault that is planted in it."""
        shared = {"client": case.client, "seed": seed, "prior": ""}
        healthy = clients.draw(case, seed)
        rows = [{**shared, "planted": "", **row} for row in self.read(*healthy)]
        planted = case.model in PLANTED and case.training.local_steps == 5
        for name, fault in FAULTS.items() if planted else ():
            if fault.optimizer not in ("", case.training.optimizer):
                continue
            if fault.models and case.model not in fault.models:
                continue
            training = fault.training(case.training, list(healthy[0].trained))
            changed = replace(case, training=training, defense=fault.defense)
            seen, _, truth = clients.draw(changed, seed)
            rows += [
                {**shared, "planted": name, **row}
                for row in self.read(fault.weights(seen), healthy[1], truth)
            ]
        return rows

    def read(self, observation: Observation, knowledge: Knowledge, truth: Truth) -> list[Row]:
        """Return what is told of an attack that starts from the mean colour, and ends at `_END`."""
        objective = matching_objective("trajectory", observation, knowledge)
        grey = torch.zeros(observation.num_examples, *knowledge.image_shape)
        losses = (objective(grey, 0.0).item(), _END)
        began = time.monotonic()
        told = diagnose(observation, knowledge, losses, objective.position(), objective.at_truth)
        return [{"diagnosis": told, "start": losses[0], "seconds": time.monotonic() - began}]

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """Return a line a model, optimiser and fault, over K and trials; then those of all."""
        lines = [list(_COLUMNS)]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(rows, key=lambda row: bool(row["planted"])):
            groups.setdefault((row["client"].rpartition(" K=")[0], row["planted"]), []).append(row)
        for (client, planted), kept in groups.items():
            lines.append([client, planted, *_counted(kept)])
        for words in ("", "some fault"):
            kept = [row for row in rows if bool(row["planted"]) == bool(words)]
            if kept:
                lines.append(["all", words, *_counted(kept)])
        return lines

    def shortfalls(self, rows: Sequence[Row]) -> list[str]:
        """Return, in words, every false alarm, and every fault that was not found."""
        return [
            f"{row['client']}, trial {row['seed']}, {row['planted'] or 'healthy'}: "
            f"{'; '.join(row['diagnosis']) or 'nothing told'}"
            for row in rows
            if _told(row) != bool(row["planted"])
        ]


def _told(row: Row) -> bool:
    """Return whether a healthy client has an alarm, or a fault is found."""
    if row["planted"]:
        return any(FAULTS[row["planted"]].words in words for words in row["diagnosis"])
    return any(_DEPENDS not in words for words in row["diagnosis"])


def _counted(rows: Sequence[Row]) -> list[str]:
    told = sum(map(_told, rows))
    hardly = sum(any(_DEPENDS in words for words in row["diagnosis"]) for row in rows)
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    asked = len(rows) if rows[0]["planted"] else 0
    return [str(len(rows)), str(told), str(asked), str(hardly), f"{seconds:.2f}"]


SUITE = _Diagnosis(
    tuple(
        Case(
            replace(training, local_steps=steps, batch_size=4),
            AttackConfig(),
            model=model,
            labels="by-step",
        )
        for model in MODELS
        for training in (SGD, ADAM)
        for steps in (1, 2, 5)
    ),
    "what is told of healthy clients, and of planted faults",
)
"""What the diagnosis tells of healthy clients, and of planted faults.

No attack is run: with 2 trials, less than 10 minutes of one thread.
"""

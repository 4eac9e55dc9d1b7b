"""The optimiser of local training: the client steps it, an attack simulates it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining

_KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
}
# Settings with a field of their own, and those that choose among torch's implementations.
_NO_OPTIONS = {
    "self", "params", "lr", "weight_decay", "nesterov",
    "foreach", "fused", "capturable", "differentiable",
}  # fmt: skip


def create_optimizer(
    weights: Mapping[str, Tensor],
    training: LocalTraining,
    *,
    step: int = 0,
    differentiable: bool = False,
) -> torch.optim.Optimizer:
    """Return the client's optimiser, fresh as at the start of every round.

    Its learning rates follow `LocalTraining.schedule` from step to step.

    Parameters
    ----------
    weights : mapping of str to Tensor
        By parameter name; those that `LocalTraining.trainable` leaves out are not stepped.
    training : LocalTraining
    step : int
        Steps of the schedule that are already made.
    differentiable : bool
        See `torch.optim`.

    Raises
    ------
    ValueError
        If the optimiser does not take an option, or no parameter is trained.
    """
    by_rates: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in weights.items():
        if training.trains(name):
            by_rates.setdefault(training.rates(name), []).append(weight)
    if not by_rates:
        raise ValueError(
            f"trainable is {', '.join(training.trainable)}; allowed: patterns of some of "
            f"{', '.join(weights)}"
        )
    groups = [
        {"params": part, "lr": lr, "weight_decay": decay} for (lr, decay), part in by_rates.items()
    ]
    optimizer = _of_options(groups, training, differentiable)
    if training.schedule:
        rates, count = [lr for lr, _ in by_rates], step

        def schedule(*_: Any) -> None:
            nonlocal count
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * training.factor(count)
            count += 1

        optimizer.register_step_pre_hook(schedule)
    return optimizer


def _of_options(
    groups: list[dict[str, Any]], training: LocalTraining, differentiable: bool
) -> torch.optim.Optimizer:
    kind = _KINDS[training.optimizer]
    fixed: dict[str, Any] = {"lr": training.lr, "differentiable": differentiable}
    if training.optimizer == "sgd":
        fixed |= {"momentum": training.momentum, "nesterov": training.nesterov}
    options = dict(training.optimizer_options)
    allowed = sorted(set(inspect.signature(kind).parameters) - _NO_OPTIONS - set(fixed))
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"optimizer_options holds {name}; allowed with {training.optimizer}: "
                f"{', '.join(allowed)}"
            )
    try:
        return kind(groups, **fixed, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"optimizer_options is {options}; {training.optimizer} refuses it: {error}"
        ) from error

"""The optimiser of local training: the client steps it, an attack simulates it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fl_app.protocol import LocalTraining


def create_optimizer(
    weights: Iterable[nn.Parameter], training: LocalTraining
) -> torch.optim.Optimizer:
    """Return the client's optimiser, fresh as at the start of every round."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            weights,
            lr=training.lr,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    return kind(weights, lr=training.lr, weight_decay=training.weight_decay)

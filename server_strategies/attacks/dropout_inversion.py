"""Dropout inversion: inverting gradients, with masks of dropout optimised jointly.

A mask starts as a random one of the client's distribution, and stays in [0, 1]. It is
optimised whether or not `Knowledge.defense` names the dropout. Without dropout
this is `inverting_gradients`. Masks have the learning rate of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fl_app.protocol import Knowledge
from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.matching.base import MatchingObjective
from server_strategies.attacks.optimise import step_schedule
from server_strategies.attacks.options import MATCHING, STEPPED_LR, TV, option
from server_strategies.priors.total_variation import TotalVariation


@dataclass(frozen=True)
class DropoutInversion(Attack):
    """Inverting gradients with one dropout mask an image; its authors use up to 20,000 iterations.

    Source: Scheliga, Mäder & Seeland, Dropout is NOT All You Need, AAAI 2023.
    """

    name: ClassVar[str] = "dropout_inversion"

    matching: str = option("gradient", MATCHING)
    lr: float = option(0.1, STEPPED_LR)
    tv: float = option(0.2, TV)
    mask: float = option(
        1e-2, "weight of |1 - mean(m) - p|: a layer's masks m leave out a share p", low=0
    )

    def assume(self, known: Knowledge) -> Knowledge:
        """See `Attack`; the model's dropout is taken for the client's defence."""
        return replace(known, defense=replace(known.defense, dropout=known.dropout))

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        matching = task.matching(self.matching)
        self._draw_masks(matching, task)
        return Parts(
            matching,
            [TotalVariation(self.tv, task.known.std)],
            lr=self.lr,
            schedule=step_schedule,
            signed=True,
        )

    def _draw_masks(self, matching: MatchingObjective, task: Task) -> None:
        share, generator = task.known.dropout, task.generator()

        def penalty(value: Tensor) -> Tensor:
            return self.mask * (1 - value.mean() - share).abs()

        for place, unknown in enumerate(matching.unknowns):
            if any(unknown is mask for mask in matching.masks):
                with torch.no_grad():
                    unknown.value.bernoulli_(1 - share, generator=generator)
                matching.unknowns[place] = replace(unknown, lr=self.lr, prior=penalty)

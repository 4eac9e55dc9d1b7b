"""Surrogate model extension, as its authors run it: every constant is the published one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.optimise import step_schedule
from server_strategies.attacks.options import MATCHING, STEPPED_LR, TV, option
from server_strategies.priors.total_variation import TotalVariation


@dataclass(frozen=True)
class SME(Attack):
    """Surrogate interpolation and total variation; its authors use 1,000 iterations.

    Source: Zhu, Yao & Blaschko, Surrogate Model Extension, ICML 2023.
    """

    name: ClassVar[str] = "sme"

    matching: str = option("surrogate", MATCHING)
    alpha: float = option(0.5, "where the surrogate starts, w0 (0) to w1 (1)", low=0, high=1)
    lr: float = option(1.0, STEPPED_LR)
    tv: float = option(0.01, TV)

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        matching = task.matching(self.matching, alpha=self.alpha)
        priors = [TotalVariation(self.tv, task.known.std)]
        return Parts(matching, priors, lr=self.lr, schedule=step_schedule)

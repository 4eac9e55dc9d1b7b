"""Inverting Gradients: cosine distance to the gradient at w0, by the sign of its gradient.

The constants are those of its authors' CIFAR-10 experiments; total variation weighs 0.1 in
their code, which does not halve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.optimise import step_schedule
from server_strategies.attacks.options import MATCHING, STEPPED_LR, TV, option
from server_strategies.priors.total_variation import TotalVariation


@dataclass(frozen=True)
class InvertingGradients(Attack):
    """Cosine gradient matching and total variation, by signed Adam; 4,800 iterations.

    Source: Geiping, Bauermeister, Dröge & Moeller, Inverting Gradients, NeurIPS 2020.
    """

    name: ClassVar[str] = "inverting_gradients"

    matching: str = option("gradient", MATCHING)
    lr: float = option(0.1, STEPPED_LR)
    tv: float = option(0.2, TV)
    restarts: int = option(1, "starts; that of least matching loss is returned", low=1)

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        return Parts(
            task.restarts(self.restarts, self.matching),
            [TotalVariation(self.tv, task.known.std)],
            lr=self.lr,
            schedule=step_schedule,
            signed=True,
        )

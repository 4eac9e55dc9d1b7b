"""GradInversion: distances of gradients at w0, layer by layer, over restarts that agree.

Its priors are group consistency, total variation and the images' norm. Every step adds
noise. An additional matching term is BatchNorm's statistics, where the update holds them.

All weights are relative to a matching loss that is 1 for a candidate without a gradient.
The authors' are 1e-4 for `tv`, 1e-6 for `l2`, 0.01 for `group`, and 1e-3 for the sum of
the layers' distances: the same ratios where the layers' norms sum to 10. Their weight of
the statistics is 0.1 too, but they use the running ones and absolute distances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fl_app.protocol import Budget
from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.matching.restarts import Restarts
from server_strategies.attacks.optimise import cosine_schedule
from server_strategies.attacks.options import DISTANCE, MATCHING, STATISTICS, TV, option
from server_strategies.priors.group import GroupConsistency
from server_strategies.priors.squared_norm import SquaredNorm
from server_strategies.priors.total_variation import TotalVariation


@dataclass(frozen=True)
class GradInversion(Attack):
    """Layerwise gradient matching and group consistency over restarts; 20,000 iterations.

    Source: Yin, Mallya, Vahdat, Alvarez, Kautz & Molchanov, See through Gradients, CVPR 2021.
    """

    name: ClassVar[str] = "gradinversion"

    matching: str = option("gradient", MATCHING)
    distance: str = option("layered", DISTANCE)
    restarts: int = option(5, "starts; that of least matching loss is returned", low=1)
    lr: float = option(
        0.1, "peak learning rate of Adam on normalised pixels, after 50 iterations", low=0
    )
    tv: float = option(0.01, TV)
    l2: float = option(1e-4, "weight of the squared norm", low=0)
    group: float = option(1.0, "weight of group consistency", low=0)
    noise: float = option(0.2, "noise of every step, in learning rates", low=0)
    statistics: float = option(0.1, STATISTICS)

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        mean, std = task.known.mean, task.known.std
        matching = task.restarts(self.restarts, self.matching, distance=self.distance)
        restarts = self.restarts if isinstance(matching, Restarts) else 1
        return Parts(
            matching,
            [
                TotalVariation(self.tv, std),
                GroupConsistency(self.group, restarts),
                SquaredNorm(self.l2, mean, std),
            ],
            lr=self.lr,
            schedule=warm_up(task.budget),
            noise=self.noise,
            terms=task.statistics(self.statistics),
        )


def warm_up(budget: Budget) -> Callable[[float], float]:
    """Return a schedule that rises over 50 iterations, then falls by a half cosine to 0.

    Over a tenth of fewer than 500 iterations, or of the seconds.
    """
    warm = 0.1 if budget.seconds else min(50 / budget.iterations, 0.1)

    def schedule(progress: float) -> float:
        if progress < warm:
            return max(progress, 1 / budget.iterations) / warm
        return cosine_schedule((progress - warm) / (1 - warm), 0.0)

    return schedule

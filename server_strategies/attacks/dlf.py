"""Data Leakage in Federated Averaging: the client's local steps, simulated.

With images of their own for every pass, invariance to their order, and total variation.
The authors simulate SGD; here the client's own optimiser is, and so Adam too.

Two of the authors' constants are in other units. They optimise pixels in [0, 1],
by steps of 0.1: ``0.1 / std`` on normalised ones, 0.4 where the standard
deviation is CIFAR-10's. The weight of their total variation is 2e-4, with a distance
that is not relative to the update b: ``2e-4 std^2 / sum_l e^-l |b_l|^2`` here, 0.1 for
a client with SGD 0.01 and five steps (0.12, 0.11 on two). Taken literally for
Adam's updates, a thousand times larger in the square, there would be none. Their
penalty of pixels outside [0, 1] is void here, where pixels are boxed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.matching.passes import Passes
from server_strategies.attacks.options import DISTANCE, MATCHING, option
from server_strategies.priors.order_invariance import OrderInvariance
from server_strategies.priors.total_variation import TotalVariation


@dataclass(frozen=True)
class DLF(Attack):
    """The client's steps simulated, invariance to order, total variation; 400 iterations.

    Source: Dimitrov, Balunović, Konstantinov & Vechev, Data Leakage in Federated Averaging,
    TMLR 2022.
    """

    name: ClassVar[str] = "dlf"

    matching: str = option("passes", MATCHING)
    distance: str = option("decaying", DISTANCE)
    lr: float = option(
        0.4, "learning rate of Adam on normalised pixels; x0.997 at every twentieth", low=0
    )
    tv: float = option(0.1, "weight of total variation, of squared differences", low=0)
    invariance: float = option(
        1.0, "weight of invariance to order over passes; tuned by data set", low=0
    )

    def parts(self, task: Task) -> Parts:
        """See `Attack`; matching weighs 4 against the priors, and 2 from half-time on."""
        matching = task.matching(self.matching, distance=self.distance)
        passes = matching.complete if isinstance(matching, Passes) else 1
        count = task.seen.num_examples
        priors = (
            TotalVariation(self.tv, task.known.std, power=2),
            OrderInvariance(self.invariance, passes, count, task.generator()),
        )

        def weighted(images: Tensor, progress: float) -> Tensor:
            factor = 4 * 0.5 ** min(1, 2 * progress)
            return torch.stack([prior(images, progress) for prior in priors]).sum() / factor

        return Parts(
            matching,
            [weighted],
            lr=self.lr,
            schedule=lambda progress: 0.997 ** (20 * progress // 1),
        )

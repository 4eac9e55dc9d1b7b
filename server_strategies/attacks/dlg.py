"""Deep Leakage from Gradients: squared distance of gradients at w0, and no prior.

With Adam instead of L-BFGS, because a model with ReLU has a gradient that jumps
where the image makes a unit active: a line search ends there. The authors
replace ReLU by the sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fl_app.protocol import Knowledge
from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.optimise import cosine_schedule
from server_strategies.attacks.options import COSINE_LR, DISTANCE, MATCHING, option


@dataclass(frozen=True)
class DLG(Attack):
    """Gradient matching over images and labels together; 300 iterations of L-BFGS by its authors.

    Source: Zhu, Liu & Han, Deep Leakage from Gradients, NeurIPS 2019.
    """

    name: ClassVar[str] = "dlg"
    labels: ClassVar[str] = "fitted"

    matching: str = option("gradient", MATCHING)
    distance: str = option("squared", DISTANCE)
    lr: float = option(0.1, COSINE_LR)

    def assume(self, known: Knowledge) -> Knowledge:
        """See `Attack`; labels are not read."""
        return known.granting("unknown")

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        matching = task.matching(self.matching, distance=self.distance)
        return Parts(matching, lr=self.lr, schedule=cosine_schedule)

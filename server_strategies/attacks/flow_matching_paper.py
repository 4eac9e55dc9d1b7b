"""The paper's attack to the letter, beside what `flow_matching` makes of it.

The paper leaves open: the weights of eq. 18, the mapping of iterations to flow time, the learning
rates, the first alpha, and the matching loss at which it stops (its recovery threshold). The weight
of eq. 17 is the largest that costs no more than 0.1 dB on an untrained tuning client, by
``flowleak bench paper --tune``. The threshold is in ``conf/attack/flow_matching_paper.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.options import MATCHING, option
from server_strategies.priors.flow import FlowPrior
from server_strategies.priors.total_variation import TotalVariation


def constant(progress: float) -> float:
    """Return a learning rate's factor that does not fall: 1."""
    return 1.0


@dataclass(frozen=True)
class FlowMatchingPaper(Attack):
    """Surrogate matching, the velocity's square, total variation; 20,000 to 30,000 iterations.

    Source: Deep Leakage with Generative Flow Matching Denoiser (the paper), eq. 7, 8, 17 and 18.
    """

    name: ClassVar[str] = "flow_matching_paper"
    needs_prior: ClassVar[bool] = True

    matching: str = option("surrogate", MATCHING)
    alpha: float = option(0.5, "where the surrogate starts, w0 (0) to w1 (1)", low=0, high=1)
    flow: float = option(0.001, "weight of eq. 17, the mean square of the velocity", low=0)
    tv: float = option(0.01, "weight of total variation", low=0)
    t_start: float = option(0.5, "flow time t(k) at the first iteration", low=1e-6, high=1)
    t_end: float = option(0.95, "flow time t(k) at the last iteration", low=1e-6, high=1)
    lr: float = option(0.1, "learning rate of Adam on normalised pixels", low=0)
    network: str = option("unet64", "velocity network, as prior.weights names it")

    def weights(self, chosen: str) -> str:
        """See `Attack`; the paper's network, whatever was chosen."""
        return self.network

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        times = (self.t_start, self.t_end, task.generator())
        return Parts(
            task.matching(self.matching, alpha=self.alpha),
            [
                TotalVariation(self.tv, task.known.std),
                FlowPrior(task.network, self.flow, "velocity", *times),
            ],
            lr=self.lr,
            schedule=constant,
        )

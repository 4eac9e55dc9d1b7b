"""The trajectory of a client that shuffles its images in every pass, in an unknown order."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from server_strategies.attacks.matching.base import Setting
from server_strategies.attacks.matching.trajectory import Trajectory


class Passes(Trajectory):
    """`Trajectory` with separate candidates for every pass (Dimitrov et al., 2022).

    So no pass is assumed to take the images in the order of another one. The
    reconstruction averages each image of the first pass with those of later passes
    that a linear assignment on the squared error gives it.

    Parameters are `MatchingObjective`'s.

    Attributes
    ----------
    complete : int
        Passes that take every image; the last one may take only some.
    """

    name = "passes"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.count = setting.observation.num_examples
        steps = self.training.steps_a_pass(self.count)
        self.complete = max(1, len(self.batches) // steps)
        self.candidates = math.ceil(len(self.batches) / steps)
        self.indices = [
            index + step // steps * self.count for step, index in enumerate(self.indices)
        ]

    def reassignments(self) -> list[tuple[int, int]]:
        """See `MatchingObjective`; none: every pass has an order of its own."""
        return []

    def targets(self) -> Tensor:
        """See `MatchingObjective`; the same in every pass."""
        targets = super().targets()
        return targets.repeat(self.candidates, *[1] * (targets.dim() - 1))

    def found_images(self, x: Tensor) -> Tensor:
        """See `MatchingObjective`."""
        first = x[: self.count]
        total, taken = first.clone(), torch.ones(self.count, device=x.device)
        # The images that later passes take, each once.
        later = torch.cat(self.indices).unique()
        for start in range(self.count, len(x), self.count):
            part = x[later[(later >= start) & (later < start + self.count)]]
            apart = (first[:, None] - part).square().mean((2, 3, 4))
            rows, columns = linear_sum_assignment(apart.cpu().numpy())
            total[rows] += part[columns]
            taken[rows] += 1
        return total / taken.view(-1, 1, 1, 1)

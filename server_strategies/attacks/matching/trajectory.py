"""The optimiser's trajectory: the client's own K local steps are simulated, and compared."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate, combinations

import torch
from torch import Tensor

from server_strategies.attacks.matching.base import EVERY_SETTING, MatchingObjective, Setting
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.outer_products import OuterSum, cheaper_as_sums
from server_strategies.attacks.matching.simulation import displacement


def swappable(
    classes: Sequence[int], places: Sequence[Hashable], by_step: bool
) -> list[tuple[int, int]]:
    """Return the pairs of images in different places; of one class each, if labels are by step."""
    return [
        (a, b)
        for a, b in combinations(range(len(places)), 2)
        if places[a] != places[b] and (classes[a] == classes[b] or not by_step)
    ]


class Trajectory(MatchingObjective):
    """Distance between the simulated and the observed displacement of the weights.

    By the cosine ``1 - cos(w_K(x) - w0, w1 - w0)`` over all parameters as one vector.
    Published for SGD (Dimitrov et al., 2022), here with the client's own optimiser and
    a smoothed Adam, and with every setting of `LocalTraining`.

    The smoothing r falls geometrically over the attack. A large r makes the loss easy
    to descend. A small r makes it low at the ground truth, which the last local steps
    need: with r = 0.1 the mean colour in place of the last of five batches changes the
    loss by a hundredth of its value at the ground truth.

    Parameters
    ----------
    setting : Setting
    smoothing, last_smoothing : float
        r of `Adam`, or of `TorchStep`, at the attack's start and end.
    """

    name = "trajectory"
    models = EVERY_SETTING

    def __init__(
        self, setting: Setting, smoothing: float = 0.1, last_smoothing: float = 0.01
    ) -> None:
        super().__init__(setting)
        self.smoothing, self.fall = smoothing, last_smoothing / smoothing
        seen = [self.w1[name] - w for name, w in self.w0.items()]
        known = consistent(seen, self.knowledge.defense)
        self.distance = self.measure(seen, known=known)
        self.by_step = self.knowledge.labels_level == "by-step"
        self.indices = [torch.tensor(batch, device=self.labels.device) for batch in self.batches]
        self.taken = list(accumulate((len(batch) for batch in self.batches), initial=0))
        self._sums: tuple[str, ...] | None = None  # found with the first images

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the distance, shape (), of normalised images (N, C, H, W)."""
        return self.distance(self.displacement(x, progress))

    def reassignments(self) -> list[tuple[int, int]]:
        """See `MatchingObjective`: pairs of images in different local steps.

        Of one class each, where it is known which label belongs to which step.
        """
        if self.labels.requires_grad:
            return []
        return swappable(self.labels.tolist(), self.steps_of_images(), self.by_step)

    def steps_of_images(self) -> list[tuple[int, ...]]:
        """Return by image the local steps that train on it."""
        return [
            tuple(step for step, batch in enumerate(self.batches) if image in batch)
            for image in range(len(self.labels))
        ]

    def displacement(self, x: Tensor, progress: float) -> list[Tensor | OuterSum]:
        """Return ``w_K(x) - w0``, in one piece a parameter, of normalised images (N, C, H, W)."""
        y, smoothing = self.targets(), self.smoothing * self.fall**progress
        batches = [
            (x[batch], y[batch], *self.noise_of(taken, x[batch]))
            for batch, taken in zip(self.indices, self.taken, strict=False)
        ]
        if self._sums is None:
            images = self.taken[-1]
            self._sums = cheaper_as_sums(self.model, self.w0, batches[0], self.training, images)
        return displacement(self.model, self.w0, batches, self.training, smoothing, self._sums)

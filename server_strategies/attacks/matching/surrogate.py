"""Surrogate interpolation: one gradient, at weights between w0 and w1."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.base import (
    OF_A_GRADIENT,
    MatchingObjective,
    Setting,
    Unknown,
)
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.distance import CosineDistance
from server_strategies.attacks.matching.gradient import constant_gradient_speeds, loss_gradient


class Surrogate(MatchingObjective):
    """Surrogate model extension (Zhu et al., 2023; the paper, eq. 7 and 8).

    ``1 - cos(w0 - w1, g(w_a, x))`` with ``w_a = (1 - a) w0 + a w1``, over all
    parameters as one vector; a is optimised jointly with the images.

    Parameters
    ----------
    setting : Setting
    alpha : float, optional
        Initial a, in [0, 1]; the authors start at 0.5. By default where the client took
        its gradients on average, see `mean_position`.
    """

    name = "surrogate"
    models = OF_A_GRADIENT

    def __init__(self, setting: Setting, alpha: float | None = None) -> None:
        super().__init__(setting)
        self.update = [
            before - after for before, after in zip(self.w0.values(), self.w1.values(), strict=True)
        ]
        known = consistent(self.update, self.knowledge.defense, rescale=True)
        self.distance = CosineDistance(self.update, known=known)
        start = mean_position(self.training, len(self.batches)) if alpha is None else alpha
        self.alpha = torch.tensor(start).to(self.update[0]).requires_grad_()
        self.unknowns.append(Unknown(self.alpha, lr=1e-3))

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the cosine distance, shape (), of normalised images (N, C, H, W)."""
        pairs = zip(self.w0.items(), self.update, strict=True)
        weights = {name: w - self.alpha * u for (name, w), u in pairs}
        x, y = x[: self.used], self.targets()[: self.used]
        noise = self.noise_of(0, x)
        return self.distance(loss_gradient(self.model, weights, x, y, self.training, noise))

    def position(self) -> float:
        """See `MatchingObjective`."""
        return self.alpha.item()


def mean_position(training: LocalTraining, num_steps: int) -> float:
    """Return where between w0 and w1 a client took its gradients on average, in [0, 1).

    For a gradient that stays the same: ``sum_k c_k p_k / sum_k c_k``, with p_k the
    share of the displacement made before step k, and c_k what the gradient of step
    k is worth in all of it. (K - 1) / 2K for SGD; less with momentum, whose early
    gradients count most. Adam's steps count alike.

    Parameters
    ----------
    training : LocalTraining
    num_steps : int
        K.
    """
    speeds = constant_gradient_speeds(training, num_steps)
    moved = [0.0, *accumulate(speeds)]
    worth = reversed(speeds)
    return sum(c * p for c, p in zip(worth, moved, strict=False)) / moved[-1] ** 2

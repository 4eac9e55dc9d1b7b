"""Surrogate interpolation: one gradient, somewhere between w0 and w1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.explain.distance import CosineDistance
from server_strategies.attacks.explain.gradient import loss_gradient


class Surrogate:
    """Surrogate model extension (Zhu et al., 2023; the paper, eq. 7 and 8).

    ``1 - cos(w0 - w1, g(w_a, x))`` with ``w_a = (1 - a) w0 + a w1``, over all
    parameters as one vector; the unknown a starts at 0.5.

    Parameters
    ----------
    model : nn.Module
        On the device to work on; its weights are not read.
    observation : Observation
    knowledge : Knowledge
        With labels.
    reason : str
        Why this explanation was chosen.
    """

    name = "surrogate"

    def __init__(
        self, model: nn.Module, observation: Observation, knowledge: Knowledge, reason: str
    ) -> None:
        self.reason = reason
        reference = next(model.parameters())
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        self.w0 = [observation.w0[name].to(reference) for name in self.names]
        self.update = [
            w - observation.w1[n].to(w) for w, n in zip(self.w0, self.names, strict=True)
        ]
        self.distance = CosineDistance(self.update)
        self.labels = torch.tensor(knowledge.labels, device=reference.device)
        self.alpha = torch.tensor(0.5).to(reference).requires_grad_()
        self.unknowns = [self.alpha]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the cosine distance, shape (), of normalised images (N, C, H, W)."""
        weights = [w - self.alpha * u for w, u in zip(self.w0, self.update, strict=True)]
        by_name = dict(zip(self.names, weights, strict=True))
        return self.distance(loss_gradient(self.model, by_name, x, self.labels))

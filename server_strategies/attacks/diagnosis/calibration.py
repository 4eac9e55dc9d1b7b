"""Healthy clients to compare an update with: simulated, of the same model and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fl_app.models import clients_model
from fl_app.models.extensions import random_layers
from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.diagnosis.update import Update
from server_strategies.attacks.labels import random_images
from server_strategies.attacks.matching.distance import CosineDistance
from server_strategies.attacks.matching.simulation import simulated_weights

CLIENTS = 3


@dataclass(frozen=True)
class Healthy:
    """Updates of clients that start from the observed w0 and do what the protocol says.

    They hold noise with the spectrum of photographs, and the labels that are known or believed.
    They are simulated when first asked for: an update without any sign costs nothing.

    Attributes
    ----------
    observation : Observation
        Its w1 is not read.
    knowledge : Knowledge
    device : str
        The torch device to simulate on.
    """

    observation: Observation
    knowledge: Knowledge
    device: str = "cpu"

    @cached_property
    def updates(self) -> list[Update]:
        """The updates of `CLIENTS` simulated clients, without those that diverge or are zero."""
        training = self.knowledge.client
        generator = torch.Generator().manual_seed(0)
        # The model's first weights and the draws of its random layers are torch's own.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            model = clients_model(self.knowledge, self.observation.w0).to(self.device)
            labels = self._labels(generator)
            after = [self._after(model, labels, generator) for _ in range(CLIENTS)]
        seen = Update.of(self.observation, training)
        # What is no parameter, such as a buffer of a user's model, stays.
        found = [replace(seen, w1={**seen.w0, **w1}) for w1 in after]
        return [each for each in found if each.size.isfinite().all() and each.size.any()]

    def least(self, measure: Callable[[Update], float]) -> float:
        """Return the least of a statistic over healthy updates; infinite where there are none."""
        return min(map(measure, self.updates), default=float("inf"))

    def most(self, measure: Callable[[Update], float]) -> float:
        """Return the most of a statistic over healthy updates; minus infinity without any."""
        return max(map(measure, self.updates), default=float("-inf"))

    def apart(self) -> float:
        """Return the largest matching loss between two of them, which differ in images alone."""
        vectors = [list(each.parts.values()) for each in self.updates]
        losses = [
            CosineDistance(a)(b).item() for place, a in enumerate(vectors) for b in vectors[:place]
        ]
        return max(losses, default=float("inf"))

    def _labels(self, generator: torch.Generator) -> Tensor:
        known, count = self.knowledge.labels, self.observation.num_examples
        if known is not None and len(known) == count:
            return torch.tensor(known)
        return torch.randint(self.knowledge.num_classes, (count,), generator=generator)

    def _after(
        self, model: nn.Module, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the weights that a client returns, or the mean of those that are summed."""
        training, total = self.knowledge.client, self.observation.num_examples
        images = random_images(total, self.knowledge, generator)
        counts = self.observation.examples or (total,)
        w0 = {n: self.observation.w0[n].to(w) for n, w in model.named_parameters()}
        mean: dict[str, Tensor] = {}
        parts = zip(images.split(list(counts)), labels.split(list(counts)), strict=True)
        for x, y in parts:
            batches = [
                (x[list(batch)].to(self.device), y[list(batch)].to(self.device),
                 *(layer.draw(x[list(batch)]).to(self.device) for layer in random_layers(model)))
                for batch in training.batches(len(x))
            ]  # fmt: skip
            weights = simulated_weights(model, w0, batches, training)
            for name, w in weights.items():
                if training.trains(name):
                    share = len(x) / total
                    mean[name] = mean[name] + share * w if name in mean else share * w
        return {name: w.to(self.observation.w0[name].device) for name, w in mean.items()}

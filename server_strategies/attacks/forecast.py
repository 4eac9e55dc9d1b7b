"""What to expect of an attack before it starts: what an update can hold, and how long it takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from fl_app.models import clients_model
from fl_app.models.extensions import local_loss
from fl_app.protocol import Knowledge, Observation

_PASSES = 4.0
"""Steps of training that take as long as one simulated in an attack: it keeps them for their
gradient, and goes back through each twice (measured 3 to 4, ConvNet, B = 1 to 32)."""


@dataclass(frozen=True)
class Forecast:
    """What an update can hold of its images at most, and what a search for them takes.

    Attributes
    ----------
    images, steps : int
        N and K.
    numbers : int
        Coordinates of the update that are not zero.
    unknowns : int
        N C H W, the numbers of all images.
    seconds : float
        Estimate for an iteration that simulates all steps.
    """

    images: int
    steps: int
    numbers: int
    unknowns: int
    seconds: float

    @property
    def share(self) -> float:
        """Share of the images' numbers that the update can determine at most, in [0, 1]."""
        return min(1.0, self.numbers / self.unknowns)

    def words(self, iterations: int, seconds: float = 0.0) -> str:
        """Say it, for a search of so many iterations, and of at most so many seconds (0: any)."""
        whole = iterations * self.seconds
        minutes = min(whole, seconds) / 60 if seconds else whole / 60
        words = (
            f"{self.images} images in {self.steps} local step{'s' * (self.steps != 1)}: "
            f"{self.numbers:,} numbers of the update for {self.unknowns:,} of the images"
        )
        if self.share < 1:
            words += f", so {self.share:.1%} of them can be determined at most"
        words += f"; a search takes up to {max(minutes, 0.1):.1f} minutes"
        if seconds and whole > seconds:
            held = math.floor(seconds / max(self.seconds, 1e-9))
            words += f", which hold about {held} of its iterations"
        return words


def forecast(observation: Observation, knowledge: Knowledge, device: str = "cpu") -> Forecast:
    """Return what to expect of an attack on an update, by one step of training on noise.

    Raises
    ------
    ValueError
        If the training is unknown, or the model can't be trained.
    """
    training, count = knowledge.client, observation.num_examples
    batches = training.batches(count)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(batches[0]), *knowledge.image_shape, generator=generator).to(device)
    labels = torch.arange(len(x), device=device) % knowledge.num_classes
    with torch.random.fork_rng(devices=[]):  # what a model draws must not change an attack
        model = clients_model(knowledge, observation.w0).to(device)
        parameters = [weight for weight in model.parameters() if weight.requires_grad]
        spent = math.inf
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            loss = local_loss(model, model(x), labels, training)
            torch.autograd.grad(loss, parameters, allow_unused=True)
            spent = min(spent, time.monotonic() - began)
    images = sum(map(len, batches)) / len(batches[0])  # in batches of the first one's size
    numbers = sum(int((part != 0).sum()) for part in observation.update.values())
    unknowns = count * math.prod(knowledge.image_shape)
    return Forecast(count, len(batches), numbers, unknowns, _PASSES * images * spent)

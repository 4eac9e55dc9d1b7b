"""Generative Gradient Leakage, with a flow for its GAN.

Squared distance of gradients at w0, over the latent of a generator, one for each
image + the latent's norm. The authors' generator is a GAN trained on images like the
private ones, with their labels, and its latent has 128 numbers. Here it is the flow
prior's network: without labels, and with a latent as large as the image. They estimate the
bound of the client's clipping and the share that it prunes from the update, and
do to their own gradient what it did: ``defense="estimated"``. Like every attack, it then
compares its gradient with the nearest that the client sends alike, see `Consistent`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.matching.base import channel_scale
from server_strategies.attacks.matching.defended import estimated
from server_strategies.attacks.optimise import cosine_schedule
from server_strategies.attacks.options import DISTANCE, MATCHING, option
from server_strategies.priors.flow import generate
from server_strategies.priors.networks import check_shape


@dataclass(frozen=True)
class GGL(Attack):
    """Gradient matching over a generator's latent; 500 iterations or generations.

    Source: Li, Zhang, Liu & Liu, Generative Gradient Leakage, CVPR 2022.
    """

    name: ClassVar[str] = "ggl"
    needs_prior: ClassVar[bool] = True

    matching: str = option("gradient", MATCHING)
    distance: str = option("squared", DISTANCE)
    lr: float = option(
        0.1, "peak learning rate of Adam on the latent; falls by a half cosine", low=0
    )
    kl: float = option(
        0.1, "weight of half the latent's mean square: KL(N(z, I), N(0, I)) by coordinate", low=0
    )
    steps: int = option(2, "Euler steps from a latent to its image", low=1)
    search: str = option(
        "adam",
        "by gradient, or by CMA-ES, slower by far here (docs/attacks.md)",
        allowed=("adam", "cma"),
    )
    population: int = option(50, "candidates of a generation of CMA-ES", low=2)
    defense: str = option(
        "given",
        "clipping and pruning, as they are known; or estimated from the update",
        allowed=("given", "estimated"),
    )

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        found: dict[str, float] = {}
        if self.defense == "estimated":
            update = list(task.seen.update.values())
            defense = estimated(update, task.known.defense, task.known.client.adaptive)
            task = replace(task, known=replace(task.known, defense=defense))
            found = {"clip": defense.clip, "sparsify": defense.sparsify}
        network, shape = task.network, task.known.image_shape
        check_shape(network, (task.seen.num_examples, *shape))
        mean, std = channel_scale(task.known, task.budget.device)

        def decode(z: Tensor) -> Tensor:
            return ((generate(network, z, self.steps) + 1) / 2 - mean) / std

        return Parts(
            task.matching(self.matching, distance=self.distance),
            lr=self.lr,
            schedule=cosine_schedule,
            decode=decode,
            decay=self.kl / (task.seen.num_examples * math.prod(shape)),
            population=self.population if self.search == "cma" else 0,
            chosen=found,
        )

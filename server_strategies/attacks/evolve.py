"""Search without gradients: CMA-ES, for what the loop of `optimise` can't descend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fl_app.protocol import Budget, Observation, Reconstruction
from fl_app.util.extras import extras
from server_strategies.attacks.accounting import Report, Run
from server_strategies.attacks.optimise import Parts


def evolve(
    parts: Parts, observation: Observation, budget: Budget, report: Report | None = None
) -> Reconstruction:
    """Minimise ``matching(decode(z)) + decay / 2 |z|^2`` by CMA-ES, from z ~ N(0, I).

    With a diagonal covariance (Ros & Hansen, 2008), since a full one of z has
    millions of entries. An iteration is a generation; the budget's seconds are
    looked at between two of them. The result is the z of least cost of all.

    Parameters
    ----------
    parts : Parts
        Of which `matching`, `decode`, `decay` and `population` count.
    observation, budget, report
        See `optimise`.

    Raises
    ------
    ValueError
        If the matching has unknowns of its own, such as labels, which need their
        gradient, or the package cma is not installed.
    AttackError
        If the loss is not finite.
    """
    with extras():
        import cma  # slow to import, and few attacks need it
    matching = parts.matching
    if matching.unknowns:
        raise ValueError(
            f"search is 'cma', which can't fit what {matching.name} leaves open "
            "(labels, or a position); allowed: adam"
        )
    run = Run(matching, observation, budget, report)
    shape = (matching.candidates * observation.num_examples, *matching.knowledge.image_shape)
    noise = np.random.default_rng(budget.seed)
    strategy = cma.CMAEvolutionStrategy(
        np.zeros(int(np.prod(shape))),
        1.0,
        {
            "CMA_diagonal": True,
            "popsize": parts.population,
            "randn": lambda *size: noise.standard_normal(size),
            "seed": np.nan,  # numpy's global generator stays as it is
            "verbose": -9,
        },
    )

    def images(z: np.ndarray) -> Tensor:
        latent = torch.from_numpy(z).to(run.mean).view(shape)
        with torch.no_grad():
            return parts.decode(latent) if parts.decode else latent

    for progress in run.iterations():
        candidates = strategy.ask()
        with run.counted(progress):
            losses = torch.stack([matching(images(z), progress).detach() for z in candidates])
        penalty = [parts.decay / 2 * float(z @ z) for z in candidates]
        strategy.tell(candidates, losses.double().cpu().numpy() + penalty)
        run.note(losses.min())
    return run.found(images(strategy.best.x))

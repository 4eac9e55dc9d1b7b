"""Search without gradients: CMA-ES, for what the loop of `optimise` can't descend."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fl_app.protocol import Budget, Observation, Reconstruction
from server_strategies.attacks.explain.base import Explanation
from server_strategies.attacks.optimise import Report, Run


def evolve(
    attack: str,
    explanation: Explanation,
    observation: Observation,
    budget: Budget,
    *,
    decode: Callable[[Tensor], Tensor],
    decay: float,
    population: int,
    report: Report | None = None,
    options: Mapping[str, float | int | str],
) -> Reconstruction:
    """Minimise ``explanation(decode(z)) + decay / 2 |z|^2`` by CMA-ES, from z ~ N(0, I).

    With a diagonal covariance (Ros & Hansen, 2008), since a full one of z has
    millions of entries. An iteration is a generation; the budget's seconds are
    looked at between two of them. The result is the z of least cost of all.

    Parameters
    ----------
    attack, explanation, observation, budget, decay, report, options
        See `optimise`.
    decode : callable
        From z, of the images' shape, to normalised images.
    population : int
        Candidates of a generation, 2 or more.

    Raises
    ------
    ValueError
        If there are fewer, or the explanation has unknowns of its own, such as
        labels, which are fitted by their gradient.
    AttackError
        If the loss is not finite.
    """
    import cma  # slow to import, and few attacks need it

    if population % 1 or population < 2:
        raise ValueError(f"population is {population}; allowed: a whole number from 2")
    if explanation.unknowns:
        raise ValueError(
            f"search is 'cma', which can't fit what {explanation.name} leaves open "
            "(labels, or a position); allowed: adam"
        )
    run = Run(attack, explanation, observation, budget, report, options)
    shape = (explanation.copies * observation.num_examples, *explanation.knowledge.image_shape)
    noise = np.random.default_rng(budget.seed)
    strategy = cma.CMAEvolutionStrategy(
        np.zeros(int(np.prod(shape))),
        1.0,
        {
            "CMA_diagonal": True,
            "popsize": int(population),
            "randn": lambda *size: noise.standard_normal(size),
            "seed": np.nan,  # numpy's global generator stays as it is
            "verbose": -9,
        },
    )

    def images(z: np.ndarray) -> Tensor:
        with torch.no_grad():
            return decode(torch.from_numpy(z).to(run.mean).view(shape))

    for progress in run.iterations():
        candidates = strategy.ask()
        with run.counted(progress):
            matching = torch.stack([explanation(images(z), progress).detach() for z in candidates])
        penalty = [decay / 2 * float(z @ z) for z in candidates]
        strategy.tell(candidates, matching.double().cpu().numpy() + penalty)
        run.note(matching.min())
    return run.found(images(strategy.best.x))

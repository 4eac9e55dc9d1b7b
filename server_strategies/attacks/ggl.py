"""Generative Gradient Leakage (Li, Zhang, Liu & Liu, CVPR 2022), with a flow for its GAN.

Squared distance of gradients at w0, over the latent of a generator, one for each
image + the latent's norm. The authors' generator is a GAN trained on images like the
private ones, with their labels, and its latent has 128 numbers. Here it is the flow
prior's network: without labels, and with a latent as large as the image. They apply
an estimate of the client's defence to their own gradient, which is left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.evolve import evolve
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, cosine_schedule, optimise
from server_strategies.priors.flow import generate
from server_strategies.priors.networks import check_shape

SEARCHES = ("adam", "cma")


def ggl(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "gradient",
    distance: str = "squared",
    lr: float = 0.1,
    kl: float = 0.1,
    steps: int = 2,
    search: str = "adam",
    population: int = 50,
) -> Reconstruction:
    """Reconstruct a client's images as those that a generator makes of some noise.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : nn.Module
        A velocity network from `priors.flow.load_flow`, on the budget's device.
    budget : Budget
        The authors use 500 iterations or more, or as many generations.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors match the gradient at w0, here with the mean step of several;
        for others see `explain`.
    distance : str
        The authors' is `squared`; for others see `explain`.
    lr : float
        Peak learning rate of Adam on the latent, which falls by a half cosine.
    kl : float
        Weight of half the mean square of the latent: but for a constant the
        divergence of N(z, I) from N(0, I), by coordinate.
    steps : int
        Euler steps from a latent to its image, each a run of the network.
    search : {"adam", "cma"}
        By the gradient, or by CMA-ES without one, see `evolve`. The authors prefer
        the latter, in the 128 numbers of a GAN's latent; in the thousands here it is
        slower by far (docs/attacks.md).
    population : int
        Candidates of a generation of CMA-ES.

    Raises
    ------
    ValueError
        If an option has no such value, the network can't take images of this
        shape, or the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    if steps % 1 or steps < 1:
        raise ValueError(f"steps is {steps}; allowed: a whole number from 1")
    if search not in SEARCHES:
        raise ValueError(f"search is {search!r}; allowed: {', '.join(SEARCHES)}")
    check_shape(prior, (observation.num_examples, *knowledge.image_shape))
    knowledge = infer(observation, knowledge, budget.device)
    scale = (knowledge.mean, knowledge.std)
    mean, std = (torch.tensor(v, device=budget.device).view(-1, 1, 1) for v in scale)

    def decode(z: Tensor) -> Tensor:
        return ((generate(prior, z, int(steps)) + 1) / 2 - mean) / std

    explanation = explain_update(explain, observation, knowledge, budget.device, distance=distance)
    decay = kl / (observation.num_examples * math.prod(knowledge.image_shape))
    options: dict[str, float | int | str] = {
        "distance": distance,
        "lr": lr,
        "kl": kl,
        "steps": steps,
        "search": search,
        "population": population,
    }
    if search == "cma":
        return evolve(
            "ggl",
            explanation,
            observation,
            budget,
            decode=decode,
            decay=decay,
            population=population,
            report=report,
            options=options,
        )
    return optimise(
        "ggl",
        explanation,
        [],
        observation,
        budget,
        lr=lr,
        schedule=cosine_schedule,
        decode=decode,
        decay=decay,
        report=report,
        options=options,
    )

"""Dropout inversion attack (Scheliga, Mäder & Seeland, AAAI 2023).

Inverting gradients, with the masks of the model's dropout fitted beside the images.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.explain.base import Unknown
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, optimise, step_schedule
from server_strategies.priors.total_variation import TotalVariation


def dropout_inversion(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "gradient",
    lr: float = 0.1,
    tv: float = 0.2,
    mask: float = 1e-2,
) -> Reconstruction:
    """Reconstruct a client's images and what its model's dropout left out of them.

    A mask starts as one that the client may have drawn, and stays in [0, 1]. It is
    fitted whether or not `Knowledge.defense` names the dropout. Without dropout
    this is `inverting_gradients`.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : None
        Not used.
    budget : Budget
        The authors use 20,000 iterations or less.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors match the gradient at w0, here with the mean step of several,
        which has one mask an image; for others see `explain`.
    lr : float
        Learning rate on normalised pixels and on masks; x0.1 at 3/8, 5/8 and 7/8.
    tv : float
        Weight of the total variation, as in `inverting_gradients`.
    mask : float
        Weight of ``|1 - mean(m) - p|``: a layer's masks m are to leave out a share
        p. The authors tune it.

    Raises
    ------
    ValueError
        If an option has no such value, or the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    known = replace(knowledge.defense, dropout=knowledge.dropout)
    knowledge = infer(observation, replace(knowledge, defense=known), budget.device)
    explanation = explain_update(explain, observation, knowledge, budget.device)
    generator = torch.Generator(budget.device).manual_seed(budget.seed)

    def believe(value: Tensor) -> Tensor:
        return mask * (1 - value.mean() - knowledge.dropout).abs()

    def as_mask(unknown: Unknown) -> Unknown:
        if not any(unknown is noise for noise in explanation.masks):
            return unknown
        with torch.no_grad():
            unknown.value.bernoulli_(1 - knowledge.dropout, generator=generator)
        return replace(unknown, lr=lr, prior=believe)

    explanation.unknowns = [as_mask(unknown) for unknown in explanation.unknowns]
    return optimise(
        "dropout_inversion",
        explanation,
        [TotalVariation(tv, knowledge.std)],
        observation,
        budget,
        lr=lr,
        schedule=step_schedule,
        signed=True,
        report=report,
        options={"lr": lr, "tv": tv, "mask": mask},
    )

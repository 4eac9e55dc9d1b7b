"""Surrogate model extension (Zhu, Yao & Blaschko, ICML 2023), as its authors run it.

Surrogate + total variation; every constant is the published one.
"""

from __future__ import annotations

from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, optimise, step_schedule
from server_strategies.priors.total_variation import TotalVariation


def sme(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "surrogate",
    alpha: float = 0.5,
    lr: float = 1.0,
    tv: float = 0.01,
) -> Reconstruction:
    """Reconstruct a client's images from its update without a learned prior.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : None
        Not used.
    budget : Budget
        The authors use 1,000 iterations.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        SME is the surrogate; others, see `explain`, show what it loses by that.
    alpha : float
        Where the surrogate starts between w0 (0) and w1 (1).
    lr : float
        Learning rate of Adam on normalised pixels; x0.1 at 3/8, 5/8 and 7/8.
    tv : float
        Weight of the total variation.

    Raises
    ------
    ValueError
        If the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    knowledge = infer(observation, knowledge, budget.device)
    return optimise(
        "sme",
        explain_update(explain, observation, knowledge, budget.device, alpha),
        [TotalVariation(tv, knowledge.std)],
        observation,
        budget,
        lr=lr,
        schedule=step_schedule,
        report=report,
        options={"alpha": alpha, "lr": lr, "tv": tv},
    )

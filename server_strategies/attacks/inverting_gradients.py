"""Inverting Gradients (Geiping, Bauermeister, Dröge & Moeller, NeurIPS 2020).

Cosine distance to the gradient at w0 + total variation, by Adam on the sign of
the gradient; the constants are those of its CIFAR-10 experiments.
"""

from __future__ import annotations

from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.explain.seeds import Seeds
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, optimise, step_schedule
from server_strategies.priors.total_variation import TotalVariation


def inverting_gradients(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "gradient",
    lr: float = 0.1,
    tv: float = 0.2,
    restarts: int = 1,
) -> Reconstruction:
    """Reconstruct a client's images as those whose gradient points along its update.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : None
        Not used.
    budget : Budget
        The authors use 4,800 iterations.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors match the gradient at w0, here with the mean step of several;
        for others see `explain`.
    lr : float
        Learning rate on normalised pixels; x0.1 at 3/8, 5/8 and 7/8.
    tv : float
        Weight of the total variation, 0.1 in the authors' code, which does not
        halve it.
    restarts : int
        Starts, run side by side; the one of least matching loss is returned.

    Raises
    ------
    ValueError
        If an option has no such value, or the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    knowledge = infer(observation, knowledge, budget.device)
    return optimise(
        "inverting_gradients",
        Seeds(lambda: explain_update(explain, observation, knowledge, budget.device), restarts),
        [TotalVariation(tv, knowledge.std)],
        observation,
        budget,
        lr=lr,
        schedule=step_schedule,
        signed=True,
        report=report,
        options={"lr": lr, "tv": tv, "restarts": restarts},
    )

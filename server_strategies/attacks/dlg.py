"""Deep Leakage from Gradients (Zhu, Liu & Han, NeurIPS 2019).

Squared distance of gradients at w0, by L-BFGS on images and labels together; no
prior. The authors' L-BFGS has no line search; without it, it diverges on ReLU.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, lbfgs, optimise


def dlg(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "gradient",
    lr: float = 1.0,
) -> Reconstruction:
    """Reconstruct a client's images and labels from its gradient alone.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        Its labels are not read: they are fitted beside the images. How the client
        trains is inferred where it is missing, see `infer`.
    prior : None
        Not used.
    budget : Budget
        The authors use 300 iterations, of 20 L-BFGS steps each.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors match the gradient at w0, here with the mean step of several;
        for others see `explain`.
    lr : float
        Of L-BFGS: its first trial step.

    Raises
    ------
    ValueError
        If the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    knowledge = infer(observation, replace(knowledge, labels=None), budget.device, "fitted")
    return optimise(
        "dlg",
        explain_update(explain, observation, knowledge, budget.device, distance="squared"),
        [],
        observation,
        budget,
        lr=lr,
        schedule=lambda progress: 1.0,
        make_optimizer=lbfgs,
        report=report,
        options={"lr": lr},
    )

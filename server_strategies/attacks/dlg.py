"""Deep Leakage from Gradients (Zhu, Liu & Han, NeurIPS 2019).

Squared distance of gradients at w0, over images and labels together; no prior.
With Adam instead of L-BFGS, because a model with ReLU has a gradient that jumps
where the image makes a unit active: a line search ends there. The authors
replace ReLU by the sigmoid.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, cosine_schedule, optimise


def dlg(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "gradient",
    distance: str = "squared",
    lr: float = 0.1,
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
        The authors use 300 iterations of L-BFGS, with 20 gradients each.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors match the gradient at w0, here with the mean step of several;
        for others see `explain`.
    distance : str
        The authors' is `squared`; for others see `explain`.
    lr : float
        Peak learning rate on normalised pixels, which falls by a half cosine.

    Raises
    ------
    ValueError
        If the explanation or the distance is unknown or does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    return match_alone(
        "dlg", "fitted", observation, knowledge, budget, report, explain, distance, lr
    )


def match_alone(
    attack: str,
    labels: str,
    observation: Observation,
    knowledge: Knowledge,
    budget: Budget,
    report: Report | None,
    explain: str,
    distance: str,
    lr: float,
) -> Reconstruction:
    """Match the update and nothing else, with labels found as `infer` says.

    What `dlg` and `idlg` share; parameters are theirs, with the attack's name and
    the `labels` of `infer` before them.
    """
    knowledge = infer(observation, replace(knowledge, labels=None), budget.device, labels)
    return optimise(
        attack,
        explain_update(explain, observation, knowledge, budget.device, distance=distance),
        [],
        observation,
        budget,
        lr=lr,
        schedule=cosine_schedule,
        report=report,
        options={"distance": distance, "lr": lr},
    )

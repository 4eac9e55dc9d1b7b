"""Improved Deep Leakage from Gradients (Zhao, Mopuri & Bilen, 2020).

The label from the sign of the last layer's gradient, then DLG on the images alone,
with Adam as there.
"""

from __future__ import annotations

from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.dlg import match_alone
from server_strategies.attacks.optimise import Report


def idlg(
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
    """Reconstruct a client's images from its gradient, after their labels.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        Its labels are not read: they are recovered, or fitted beside the images
        where several are alike. How the client trains is inferred where it is
        missing, see `infer`.
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
        "idlg", "idlg", observation, knowledge, budget, report, explain, distance, lr
    )

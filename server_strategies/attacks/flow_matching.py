"""Deep leakage with a generative flow matching denoiser: the attack of the paper.

An explanation of the update + a flow-matching prior + a little total variation
(eq. 18). The paper explains by a surrogate with alpha fitted jointly, which is
`explain="surrogate"`. By default the client's own optimiser is simulated where
that is possible: it explains SGD better, and Adam at all.
"""

from __future__ import annotations

import torch
from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.optimise import Report, cosine_schedule, optimise
from server_strategies.priors.flow import FlowPrior
from server_strategies.priors.total_variation import TotalVariation

# By the client's optimiser, measured on CIFAR-10 with the shipped prior; the paper's own weights
# are lost. An update of SGD is explained exactly, so less has to be believed.
RECIPES = {
    "sgd": {"lr": 0.8, "flow": 0.3, "tv": 0.03},
    "adam": {"lr": 0.8, "flow": 1.0, "tv": 0.03},
    "adamw": {"lr": 0.8, "flow": 1.0, "tv": 0.03},
}


def flow_matching(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "auto",
    mode: str = "denoiser",
    lr: float | None = None,
    flow: float | None = None,
    tv: float | None = None,
    t_start: float = 0.8,
    t_end: float = 0.95,
) -> Reconstruction:
    """Reconstruct a client's images from its update with a flow prior.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        With labels.
    prior : nn.Module
        A velocity network from `priors.flow.load_flow`, on the budget's device.
    budget : Budget
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : {"auto", "surrogate", "trajectory"}
    mode : {"denoiser", "velocity"}
        See `FlowPrior`; `velocity` is eq. 17 to the letter.
    lr : float, optional
        Peak learning rate of Adam on normalised pixels. This and the weights
        below default to what was measured best for the client, `RECIPES`.
    flow, tv : float, optional
        Weights of the priors.
    t_start, t_end : float
        Flow time t(k), linear over the iterations.

    Raises
    ------
    ValueError
        If the labels are unknown, or an option has no such value.
    AttackError
        If the optimisation diverges.
    """
    explanation = explain_update(explain, observation, knowledge, budget.device)
    constants = {**RECIPES[knowledge.training.optimizer]}
    constants.update({k: v for k, v in {"lr": lr, "flow": flow, "tv": tv}.items() if v is not None})
    noise = torch.Generator(budget.device).manual_seed(budget.seed)
    return optimise(
        "flow_matching",
        explanation,
        [
            TotalVariation(constants["tv"], knowledge.std),
            FlowPrior(prior, constants["flow"], mode, t_start, t_end, noise),
        ],
        knowledge,
        budget,
        lr=constants["lr"],
        schedule=cosine_schedule,
        report=report,
        options={"mode": mode, "t_start": t_start, "t_end": t_end, **constants},
    )

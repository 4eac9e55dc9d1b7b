"""GradInversion (Yin, Mallya, Vahdat, Alvarez, Kautz & Molchanov, CVPR 2021).

Distances of gradients at w0, layer by layer + group consistency over several
starts + total variation + the images' norm + the statistics of BatchNorm, where the
update tells them, with noise.
"""

from __future__ import annotations

from torch import nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.explain.batch_norm import statistics_of
from server_strategies.attacks.explain.seeds import Seeds
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, cosine_schedule, optimise
from server_strategies.priors.group import GroupConsistency
from server_strategies.priors.squared_norm import SquaredNorm
from server_strategies.priors.total_variation import TotalVariation


def gradinversion(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "gradient",
    distance: str = "layered",
    seeds: int = 5,
    lr: float = 0.1,
    tv: float = 0.01,
    l2: float = 1e-4,
    group: float = 1.0,
    noise: float = 0.2,
    statistics: float = 0.1,
) -> Reconstruction:
    """Reconstruct a client's images from several starts at once, which agree.

    All weights are beside a matching loss that is 1 for a candidate without a
    gradient. The authors' are 1e-4 for `tv`, 1e-6 for `l2` and 0.01 for `group`
    beside 1e-3 for the sum of the layers' distances: the same ratios where the
    layers' norms sum to 10.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : None
        Not used.
    budget : Budget
        The authors use 20,000 iterations. The learning rate warms up over 50, or
        a tenth of fewer than 500 or of the seconds, then falls by a half cosine.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors match the gradient at w0, here with the mean step of several;
        for others see `explain`.
    distance : str
        The authors' is `layered`; for others see `explain`.
    seeds : int
        Starts; the one of least matching loss is returned.
    lr : float
        Peak learning rate of Adam on normalised pixels.
    tv : float
        Weight of the total variation.
    l2 : float
        Weight of the squared norm.
    group : float
        Weight of the group consistency.
    noise : float
        Of every step, in learning rates.
    statistics : float
        Weight of the batches' statistics, see `BatchStatistics`: the authors' 0.1, but of
        a relative distance. They use the running statistics and absolute distances.

    Raises
    ------
    ValueError
        If an option has no such value, or the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    knowledge = infer(observation, knowledge, budget.device)
    explanation = Seeds(
        lambda: explain_update(explain, observation, knowledge, budget.device, distance=distance),
        seeds,
    )
    warm = 0.1 if budget.seconds else min(50 / budget.iterations, 0.1)

    def schedule(progress: float) -> float:
        if progress < warm:
            return max(progress, 1 / budget.iterations) / warm
        return cosine_schedule((progress - warm) / (1 - warm), 0.0)

    return optimise(
        "gradinversion",
        explanation,
        [
            TotalVariation(tv, knowledge.std),
            GroupConsistency(group, len(explanation.each)),
            SquaredNorm(l2, knowledge.mean, knowledge.std),
        ],
        observation,
        budget,
        lr=lr,
        schedule=schedule,
        noise=noise,
        evidence=statistics_of(statistics, observation, knowledge, budget.device),
        report=report,
        options={
            "distance": distance,
            "seeds": seeds,
            "lr": lr,
            "tv": tv,
            "l2": l2,
            "group": group,
            "noise": noise,
            "statistics": statistics,
        },
    )

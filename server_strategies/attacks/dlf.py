"""Data Leakage in Federated Averaging (Dimitrov, Balunović, Konstantinov & Vechev, TMLR 2022).

The client's local steps, simulated, with images of their own for every pass +
invariance to their order + total variation. The authors simulate SGD; here the
client's own optimiser is simulated, and so Adam's too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_app.protocol import Budget, Knowledge, Observation, Reconstruction
from server_strategies.attacks.explain import explain as explain_update
from server_strategies.attacks.explain.passes import Passes
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, optimise
from server_strategies.priors.order_invariance import OrderInvariance
from server_strategies.priors.total_variation import TotalVariation


def dlf(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module | None,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "passes",
    distance: str = "decaying",
    lr: float = 0.4,
    tv: float = 0.1,
    invariance: float = 1.0,
) -> Reconstruction:
    """Reconstruct a client's images by simulating all that it did.

    The matching loss weighs 4 against the priors at first and 2 from half of the
    iterations on, falling geometrically. The authors' penalty of pixels outside
    [0, 1] is void here, where they are boxed.

    Two of the authors' constants are in other units. They optimise pixels in [0, 1],
    by steps of 0.1: ``0.1 / std`` on normalised ones, 0.4 where the standard
    deviation is CIFAR-10's. Their total variation weighs 2e-4 beside a distance that
    is not relative to the update b: ``2e-4 std^2 / sum_l e^-l |b_l|^2`` here, 0.1 for
    a client with SGD 0.01 and five steps (0.12, 0.11 on two). Taken literally for
    Adam's updates, a thousand times larger in the square, there would be none.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : None
        Not used.
    budget : Budget
        The authors use 400 iterations.
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        The authors' is `passes`; for others see `explain`.
    distance : str
        The authors' is `decaying`; for others see `explain`.
    lr : float
        Learning rate of Adam on normalised pixels; x0.997 at every twentieth of the
        attack, as in 20 of the authors' 400 iterations.
    tv : float
        Weight of the total variation, of squared differences.
    invariance : float
        Weight of the invariance to the order of images, where there are several
        passes; the authors tune it for each data set.

    Raises
    ------
    ValueError
        If the explanation or the distance is unknown or does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    knowledge = infer(observation, knowledge, budget.device)
    explanation = explain_update(explain, observation, knowledge, budget.device, distance=distance)
    passes = explanation.complete if isinstance(explanation, Passes) else 1
    generator = torch.Generator(budget.device).manual_seed(budget.seed)
    beliefs = (
        TotalVariation(tv, knowledge.std, power=2),
        OrderInvariance(invariance, passes, observation.num_examples, generator),
    )

    def believe(images: Tensor, progress: float) -> Tensor:
        factor = 4 * 0.5 ** min(1, 2 * progress)
        return torch.stack([belief(images, progress) for belief in beliefs]).sum() / factor

    return optimise(
        "dlf",
        explanation,
        [believe],
        observation,
        budget,
        lr=lr,
        schedule=lambda progress: 0.997 ** (20 * progress // 1),
        report=report,
        options={"distance": distance, "lr": lr, "tv": tv, "invariance": invariance},
    )

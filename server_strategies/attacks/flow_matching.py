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
from server_strategies.attacks.explain.batch_norm import statistics_of
from server_strategies.attacks.explain.defended import noise_share
from server_strategies.attacks.infer import infer
from server_strategies.attacks.optimise import Report, cosine_schedule, optimise
from server_strategies.priors.flow import FlowPrior
from server_strategies.priors.total_variation import TotalVariation

BALANCE = {"sgd": (0.1, 0.05), "adam": (1.5, 0.45)}
"""The default `balance` and `last_balance`. A smoothed Adam needs more of the priors: its late
batches are all but open to the match. Chosen on draws 1000 to 1007, Adam's of K=5, B=4, SGD's of
four clients (`flowleak bench balances`)."""


def flow_matching(
    observation: Observation,
    knowledge: Knowledge,
    prior: nn.Module,
    budget: Budget,
    report: Report | None = None,
    *,
    explain: str = "auto",
    distance: str = "auto",
    mode: str = "denoiser",
    lr: float = 0.8,
    flow: float = 1.0,
    tv: float = 0.03,
    balance: float | None = None,
    last_balance: float | None = None,
    t_start: float = 0.8,
    t_end: float = 0.95,
    every: int = 1,
    draws: int = 1,
    polish: float = 0.0,
    statistics: float = 0.1,
    tiles: float = 0,
    gate_width: float | None = None,
) -> Reconstruction:
    """Reconstruct a client's images from its update with a flow prior.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
        What it lacks is inferred, see `infer`.
    prior : nn.Module
        A velocity network from `priors.flow.load_flow`, on the budget's device.
    budget : Budget
    report : Report, optional
        Called about once a second with the iteration and the matching loss.
    explain : str
        See `explain.explain`.
    distance : str
        See `explain.explain`. In deep models the classifier can hold most of an update's
        squared norm, which is all that cosine and square see; with `even` each parameter
        counts alike.
    mode : {"denoiser", "velocity"}
        See `FlowPrior`; `velocity` is eq. 17 to the letter.
    lr : float
        Peak learning rate of Adam on normalised pixels.
    flow, tv : float
        Weights of the priors; one of weight 0 is left out, at no cost.
    balance, last_balance : float
        How strongly the priors pull, as a multiple of the explanation's pull on
        each image, at the first and the last iteration; it falls
        geometrically. Where the update is known to carry noise it falls less, by the
        noise's share of the update's square, and never below that of its length: what
        fits the noise is not to be believed. None: see `BALANCE`. A balance of 0:
        by their weights alone, as eq. 18 has it.
    t_start, t_end : float
        Flow time t(k), linear over the iterations.
    every, draws : int
        How often the denoiser runs, and over how many draws of noise its result
        is averaged; see `FlowPrior`.
    polish : float
        Share of the iterations, the last ones, without the flow prior; in [0, 1).
        Where `balance` is not 0, total variation then pulls as strongly alone.
    statistics : float
        Weight of the batches' statistics beside the matching loss, where BatchNorm
        tells them, see `BatchStatistics`.
    tiles : float
        1: images larger than the prior's training images meet it in tiles, see `FlowPrior`.
    gate_width : float, optional
        See `explain.explain`.

    Raises
    ------
    ValueError
        If an option has no such value, or the explanation does not fit the update.
    AttackError
        If the optimisation diverges.
    """
    knowledge = infer(observation, knowledge, budget.device)
    kind = "sgd" if knowledge.client.optimizer == "sgd" else "adam"
    first = BALANCE[kind][0] if balance is None else balance
    last = BALANCE[kind][1] if last_balance is None else last_balance
    if first < 0 or last <= 0:
        raise ValueError(
            f"balance is {first}, last_balance {last}; allowed: 0 or more, more than 0"
        )
    noisy = noise_share(list(observation.update.values()), knowledge.defense)

    def balanced(progress: float) -> float:
        return max(noisy**0.5, first * (last / first) ** ((1 - noisy) * progress))

    noise = torch.Generator(budget.device).manual_seed(budget.seed)
    beliefs: list[TotalVariation | FlowPrior] = [
        TotalVariation(tv, knowledge.std),
        FlowPrior(prior, flow, mode, t_start, t_end, noise, every, draws, polish, tiles),
    ]
    explanation = explain_update(
        explain, observation, knowledge, budget.device, distance=distance, gate_width=gate_width
    )
    return optimise(
        "flow_matching",
        explanation,
        [belief for belief in beliefs if belief.weight],
        observation,
        budget,
        lr=lr,
        schedule=cosine_schedule,
        balance=balanced if first else None,
        evidence=statistics_of(statistics, observation, knowledge, budget.device),
        report=report,
        options={
            "distance": distance,
            "mode": mode,
            "lr": lr,
            "flow": flow,
            "tv": tv,
            "balance": first,
            "last_balance": last,
            "t_start": t_start,
            "t_end": t_end,
            "every": every,
            "draws": draws,
            "polish": polish,
            "statistics": statistics,
            "tiles": tiles,
            "gate_width": explanation.gate_width,
        },
    )

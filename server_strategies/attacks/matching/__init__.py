"""How an update follows from data: what an attack compares with what it saw."""

from __future__ import annotations

from typing import Any

from torch import nn

from fl_app.models import clients_model
from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.matching.adam.decode import Decoded, legible_fingerprints
from server_strategies.attacks.matching.adam.one_step import EpsInversion, GradientMatch, SignMatch
from server_strategies.attacks.matching.base import MatchingObjective
from server_strategies.attacks.matching.defended import hidden_size
from server_strategies.attacks.matching.distance import DISTANCES
from server_strategies.attacks.matching.passes import Passes
from server_strategies.attacks.matching.relu_smoothing import RELU_SMOOTHING, smooth_relu
from server_strategies.attacks.matching.summed import Summed
from server_strategies.attacks.matching.surrogate import Surrogate
from server_strategies.attacks.matching.trajectory import Trajectory

OBJECTIVES = {
    kind.name: kind
    for kind in (
        Surrogate,
        Trajectory,
        Passes,
        Decoded,
        Summed,
        GradientMatch,
        EpsInversion,
        SignMatch,
    )
}

_OWN_DISTANCE = (Surrogate.name, SignMatch.name)

ENOUGH_ROWS = 4
"""Rows of fingerprints a step of the first pass, below which the trajectory alone finds more: with
1.2 it found 20.5 dB for 12.9, with 6.8 only 21.3 for 23.0 (sparsified updates, Adam, K=5, B=1)."""


def matching_objective(
    kind: str,
    observation: Observation,
    knowledge: Knowledge,
    device: str = "cpu",
    alpha: float | None = None,
    distance: str = "cosine",
    relu_smoothing: float | None = 0.0,
) -> MatchingObjective:
    """Return an objective of an observation.

    Parameters
    ----------
    kind : str
        ``auto``, which chooses by what is known of the client, see `choose`, or a
        name in `OBJECTIVES`.
    observation : Observation
    knowledge : Knowledge
        With the client's training, see `infer`.
    device : str
        The torch device to work on.
    alpha : float, optional
        Where a surrogate starts, see `Surrogate`.
    distance : {"auto", "cosine", "squared", "layered", "decaying", "even"}
        See `explain.distance`. ``auto``: `squared` of a client with SGD, whose moves'
        length tells of the images too, `cosine` of others. `surrogate` and `sign` have
        one of their own. With ``auto`` as `kind` a smoothed simulation is always
        compared by the cosine: a smoothed Adam moves less than the client's, so that a
        distance which sees lengths is least where images make up for that, not at the
        client's.
    relu_smoothing : float, optional
        Of the slope that the gates of ReLU have in second derivatives, see
        `smooth_relu`; 0: none, as autograd has it. None: `RELU_SMOOTHING`, but none
        where Adam is smoothed: its steps are largest where gradients are least, at
        units that are closed, and the slope leads the search there.

    Raises
    ------
    ValueError
        If `kind` or `distance` is unknown, `kind` does not fit the update or the
        distance, `relu_smoothing` is negative, or there are not as many labels as examples.
    """
    if distance not in ("auto", *DISTANCES):
        raise ValueError(f"distance is {distance!r}; allowed: auto, {', '.join(DISTANCES)}")
    own = () if distance in ("auto", "cosine") else _OWN_DISTANCE
    allowed = [name for name in ("auto", *OBJECTIVES) if name not in own]
    if kind not in allowed:
        raise ValueError(f"matching is {kind!r}; allowed: {', '.join(allowed)}")
    model = clients_model(knowledge, observation.w0).to(device)
    labels = knowledge.labels
    if labels is not None and len(labels) != observation.num_examples:
        raise ValueError(
            f"{len(labels)} labels for {observation.num_examples} examples; allowed: one each"
        )
    reason = "asked for"
    if kind == "auto":
        kind, reason = choose(model, observation, knowledge)
        if distance not in ("auto", "cosine") and _smooths(kind, knowledge):
            distance, reason = "cosine", f"{reason}; by the cosine, as Adam is smoothed"
        reason = f"auto, {reason}"
    if distance == "auto":
        lengths = knowledge.client.optimizer == "sgd" and kind not in _OWN_DISTANCE
        distance = "squared" if lengths else "cosine"
        reason += "; by the squared distance" * lengths
    if relu_smoothing is None:
        relu_smoothing = 0.0 if _smooths(kind, knowledge) else RELU_SMOOTHING
    if relu_smoothing:
        smooth_relu(model, relu_smoothing)
    options: dict[str, Any] = {"distance": DISTANCES[distance]}
    if kind == Surrogate.name:
        options = {"alpha": alpha}
    objective = OBJECTIVES[kind](model, observation, knowledge, f"{kind}: {reason}", **options)
    objective.relu_smoothing = relu_smoothing
    return objective


def _smooths(kind: str, knowledge: Knowledge) -> bool:
    """Return whether an objective simulates Adam, which it smooths."""
    simulates = issubclass(OBJECTIVES[kind], (Trajectory, Summed))
    return simulates and knowledge.client.optimizer != "sgd"


def choose(model: nn.Module, observation: Observation, knowledge: Knowledge) -> tuple[str, str]:
    """Return the objective that suits a client, and why.

    One step: the gradient itself, from SGD exactly, from Adam by its epsilon
    where the update is clean enough. Several steps: the client's own trajectory,
    where Adam left fingerprints with their images decoded first. Where later
    passes take the images in an order that is not known, they are taken in the
    first's: that is off by far less than other images would be. Where a defence
    that is known hides the size of moves, nothing of Adam's can be inverted.
    """
    training, count = knowledge.client, observation.num_examples
    if knowledge.defense.secagg:
        return "sum", f"secure aggregation of {len(observation.examples)} clients"
    optimizer, steps = training.optimizer, len(training.batches(count))
    if steps == 1 and optimizer == "sgd":
        return "gradient", "one step of sgd is its gradient"
    hidden = ""
    if optimizer != "sgd":
        hidden = hidden_size(list(observation.update.values()), knowledge.defense)
    if steps == 1 and hidden:
        return "trajectory", f"one step of {optimizer}, but {hidden}"
    if steps == 1:
        usable, why = EpsInversion.usable(observation, training)
        if usable:
            return "inversion", f"one step of {optimizer}, and {why}"
        return "trajectory", f"one step of {optimizer}, but {why}"
    shuffled = training.reshuffle and training.passes(count) > 1
    order = "later passes in the first's order" if shuffled else "whose order is known"
    why = f"{steps} steps of {optimizer}, {order}"
    if hidden:
        return "trajectory", f"{why}; no fingerprints: {hidden}"
    found = legible_fingerprints(model, observation, knowledge)
    if not found or knowledge.labels is None:
        return "trajectory", why
    told = len({seen.step for seen in found})
    rows = sum(len(seen.rows) for seen in found)
    why += f"; {told} of them show {rows} rows of their gradients"
    if rows < ENOUGH_ROWS * training.steps_a_pass(count):
        return "trajectory", f"{why}, too few"
    return "fingerprints", why

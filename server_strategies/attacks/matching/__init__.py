"""Update matching: how far the update that candidate images cause is from the observed one.

An attack optimises candidate images so that a differentiable simulation of the
client's local training reproduces the observed update, regularised by an image prior.
Here are the simulations, `OBJECTIVES`, and the choice among them, `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fl_app.models import clients_model
from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.matching.adam.decode import Decoded, usable_fingerprints
from server_strategies.attacks.matching.adam.fingerprints import Fingerprint
from server_strategies.attacks.matching.adam.one_step import EpsInversion, SignMatch
from server_strategies.attacks.matching.base import OF_A_GRADIENT, MatchingObjective, Setting
from server_strategies.attacks.matching.defended import hidden_size
from server_strategies.attacks.matching.distance import DISTANCES
from server_strategies.attacks.matching.gradient_match import GradientMatch
from server_strategies.attacks.matching.low_rank.exact import ExactFeatures, exact_features
from server_strategies.attacks.matching.low_rank.objective import LowRank
from server_strategies.attacks.matching.passes import Passes
from server_strategies.attacks.matching.relu_smoothing import RELU_SMOOTHING, smooth_relu
from server_strategies.attacks.matching.summed import Summed
from server_strategies.attacks.matching.surrogate import Surrogate
from server_strategies.attacks.matching.trajectory import Trajectory

OBJECTIVES: dict[str, type[MatchingObjective]] = {
    kind.name: kind
    for kind in (
        Surrogate,
        Trajectory,
        LowRank,
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
"""Gradient rows that decoding needs, by local step of the first pass. With fewer the
trajectory alone has the higher PSNR: 20.5 dB to 12.9 with 1.2 rows, but 21.3 to 23.0 with 6.8
(sparsified updates, Adam, K=5, B=1, untrained)."""


PLENTY_OF_ROWS = 10
"""Gradient rows a local step with which decoding them is ahead of exact features in short
searches, of one image a step: untrained, Adam, K=5, two tuning clients, 12 s: 23.1 and 29.9 dB for
13.4 and 12.9; 50 s: 31.8 and 33.9 for 28.6 and 32.0. Trained models leave fewer: there exact
features are ahead."""

_SHORT = 36.0  # seconds for exact features below which a search is short: 60% of a minute


def matching_objective(
    kind: str,
    observation: Observation,
    knowledge: Knowledge,
    device: str = "cpu",
    alpha: float | None = None,
    distance: str = "cosine",
    relu_smoothing: float | None = 0.0,
    seconds: float = 0.0,
) -> MatchingObjective:
    """Return the matching objective of an observation.

    Parameters
    ----------
    kind : str
        A name in `OBJECTIVES`, or ``auto``: chosen from the knowledge and the update,
        see `choose`.
    observation : Observation
    knowledge : Knowledge
        With the client's training, see `infer`.
    device : str
        The torch device to work on.
    alpha : float, optional
        Initial position of a surrogate, see `Surrogate`.
    distance : {"auto", "cosine", "squared", "layered", "decaying", "even"}
        See `matching.distance`. ``auto``: `squared` for SGD, where the length of the
        update depends on the images too, `cosine` for other optimisers. `surrogate`
        and `sign` have a distance of their own. With ``auto`` as `kind`, a smoothed
        simulation is always compared by the cosine: steps of a smoothed Adam are
        shorter than the client's, and a distance that sees lengths would be least at
        images that compensate for it, not at the client's.
    relu_smoothing : float, optional
        Width of the surrogate gradient for ReLU's second derivative, see
        `smooth_relu`; 0: none, as in autograd. None: `RELU_SMOOTHING`, but 0 where
        Adam is smoothed. Adam's steps are largest where gradients are smallest, at
        inactive units, and there the surrogate gradient misleads the search.
    seconds : float
        For finding exact features, see `exact_features`.

    Raises
    ------
    ValueError
        If `kind` or `distance` is unknown, `kind` does not fit the update or the
        distance, or does not model the client's training, `relu_smoothing` is negative, or
        there are not as many labels as examples.
    """
    _check(kind, distance, observation, knowledge)
    model = clients_model(knowledge, observation.w0).to(device)
    reason, exact, auto = "asked for", None, kind == "auto"
    prints: list[Fingerprint] = []
    if auto:
        kind, reason, prints = _chosen(model, observation, knowledge)
    # Where Adam left enough rows of batches, no more follows from exact features, in a minute.
    steps = knowledge.client.steps_a_pass(observation.num_examples)
    plenty = _rows(prints) >= PLENTY_OF_ROWS * steps
    batches = knowledge.client.batch_size > 1
    by_rows = kind == Decoded.name and (batches or (plenty and 0 < seconds < _SHORT))
    if kind == LowRank.name or (auto and not (by_rows or knowledge.defense.secagg)):
        exact = exact_features(model, observation, knowledge, seconds)
        if isinstance(exact, str) and not auto:
            raise ValueError(f"matching is {kind!r}, but {exact}")
    if isinstance(exact, ExactFeatures):
        kind, reason = LowRank.name, exact.reason
    if auto:
        if distance not in ("auto", "cosine") and _smooths(kind, knowledge):
            what = "Adam is" if knowledge.client.optimizer == "adam" else "its steps are"
            distance, reason = "cosine", f"{reason}; by the cosine, as {what} smoothed"
        reason = f"auto, {reason}"
    if distance == "auto":
        lengths = not knowledge.client.adaptive and kind not in _OWN_DISTANCE
        distance = "squared" if lengths else "cosine"
        reason += "; by the squared distance" * lengths
    if relu_smoothing is None:
        relu_smoothing = 0.0 if _smooths(kind, knowledge) else RELU_SMOOTHING
    if relu_smoothing:
        smooth_relu(model, relu_smoothing)
    reason = f"{kind}: {reason}"
    setting = Setting(model, observation, knowledge, reason, DISTANCES[distance])
    objective: MatchingObjective
    if isinstance(exact, ExactFeatures):
        objective = LowRank(setting, exact)
    elif kind == Surrogate.name:
        objective = Surrogate(setting, alpha)
    elif kind == Decoded.name:
        objective = Decoded(setting, prints)
    else:
        objective = OBJECTIVES[kind](setting)
    objective.relu_smoothing = relu_smoothing
    return objective


def _check(kind: str, distance: str, observation: Observation, knowledge: Knowledge) -> None:
    """Raise ValueError for what `matching_objective` does not take."""
    if distance not in ("auto", *DISTANCES):
        raise ValueError(f"distance is {distance!r}; allowed: auto, {', '.join(DISTANCES)}")
    own = () if distance in ("auto", "cosine") else _OWN_DISTANCE
    allowed = [name for name in ("auto", *OBJECTIVES) if name not in own]
    if kind not in allowed:
        raise ValueError(f"matching is {kind!r}; allowed: {', '.join(allowed)}")
    labels = knowledge.labels
    if labels is not None and len(labels) != observation.num_examples:
        raise ValueError(
            f"{len(labels)} labels for {observation.num_examples} examples; allowed: one each"
        )


def _smooths(kind: str, knowledge: Knowledge) -> bool:
    """Return whether an objective simulates Adam, or an optimiser like it, and so smooths it."""
    simulates = issubclass(OBJECTIVES[kind], (Trajectory, Summed))
    return simulates and knowledge.client.adaptive


def choose(model: nn.Module, observation: Observation, knowledge: Knowledge) -> tuple[str, str]:
    """Return the objective that suits a client, and why.

    One step: the gradient itself, exact for SGD; for Adam by its epsilon, where the
    update is clean enough. Several steps: the client's own trajectory. Where Adam left
    enough single-step gradient rows ("fingerprints"), their images are decoded first.
    Later passes whose order is unknown are simulated in the order of the first, which
    changes the update far less than other images do. Where a known defence hides the
    size of coordinate updates, Adam's steps can't be inverted. Training beyond plain SGD, Adam
    and AdamW (`LocalTraining.beyond`) is simulated.
    """
    kind, why, _ = _chosen(model, observation, knowledge)
    return kind, why


def _chosen(
    model: nn.Module, observation: Observation, knowledge: Knowledge
) -> tuple[str, str, list[Fingerprint]]:
    """Return what `choose` does, and the rows that are to be decoded."""
    training, count = knowledge.client, observation.num_examples
    if knowledge.defense.secagg:
        return "sum", f"secure aggregation of {len(observation.examples)} clients", []
    optimizer, steps = training.optimizer, len(training.batches(count))
    beyond = training.beyond(*OF_A_GRADIENT) if steps == 1 else training.beyond("drop_last")
    if beyond:
        return "trajectory", f"{steps} step{'s' * (steps > 1)} of {optimizer}, and {beyond}", []
    if steps == 1 and optimizer == "sgd":
        return "gradient", "one step of sgd is its gradient", []
    hidden = ""
    if optimizer != "sgd":
        hidden = hidden_size(list(observation.update.values()), knowledge.defense)
    if steps == 1 and hidden:
        return "trajectory", f"one step of {optimizer}, but {hidden}", []
    if steps == 1:
        usable, why = EpsInversion.usable(observation, training)
        if usable:
            return "inversion", f"one step of {optimizer}, and {why}", []
        return "trajectory", f"one step of {optimizer}, but {why}", []
    why = f"{steps} steps of {optimizer}"
    if training.passes(count) > 1:
        why += ", later passes in the first's order" if training.reshuffle else ", in one order"
    if hidden:
        return "trajectory", f"{why}; no fingerprints: {hidden}", []
    found = usable_fingerprints(model, observation, knowledge)
    if not found or knowledge.labels is None:
        return "trajectory", why, []
    read = len({part.step for part in found})
    rows = _rows(found)
    why += f"; {rows} rows of the gradients of {read} of them are readable"
    if rows < ENOUGH_ROWS * training.steps_a_pass(count):
        return "trajectory", f"{why}, too few", []
    return "fingerprints", why, found


def _rows(prints: Sequence[Fingerprint]) -> int:
    return sum(len(part.rows) for part in prints)

"""How an update follows from data: what an attack compares with what it saw."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fl_app.models import create_model
from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.explain.surrogate import Surrogate
from server_strategies.attacks.explain.trajectory import Trajectory

EXPLANATIONS = ("auto", "surrogate", "trajectory")


class Explanation(Protocol):
    """A differentiable account of an update, called on candidate images.

    Attributes
    ----------
    name : str
    reason : str
        Why it was chosen.
    unknowns : list of Tensor
        What it fits beside the images (alpha, in a surrogate), each in [0, 1].
    """

    name: str
    reason: str
    unknowns: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the matching loss, shape (), of normalised images (N, C, H, W)."""
        ...


def explain(
    kind: str, observation: Observation, knowledge: Knowledge, device: str = "cpu"
) -> Explanation:
    """Return an explanation of an observation.

    Parameters
    ----------
    kind : {"auto", "surrogate", "trajectory"}
        `auto` simulates the client's trajectory wherever the protocol tells the
        optimiser and one pass fixes the order of the batches; it falls back to
        the surrogate where a client makes several passes in unknown order.
    observation : Observation
    knowledge : Knowledge
        With labels.
    device : str
        The torch device to work on.

    Raises
    ------
    ValueError
        If `kind` is unknown, or the labels are.
    """
    if kind not in EXPLANATIONS:
        raise ValueError(f"explain is {kind!r}; allowed: {', '.join(EXPLANATIONS)}")
    if knowledge.labels is None:
        raise ValueError(
            "the labels of this update are unknown and the attack needs them; "
            "let the auditor grant them: audit.truth=true audit.labels=given"
        )
    if len(knowledge.labels) != observation.num_examples:
        raise ValueError(
            f"{len(knowledge.labels)} labels for {observation.num_examples} examples; "
            "allowed: one each"
        )
    reason = "asked for"
    if kind == "auto":
        kind, reason = _choose(knowledge.training, observation.num_examples)
    model = create_model(knowledge.model, knowledge.num_classes, knowledge.image_shape).to(device)
    explanation = Surrogate if kind == "surrogate" else Trajectory
    return explanation(model, observation, knowledge, f"{kind}: {reason}")


def _choose(training: LocalTraining, num_examples: int) -> tuple[str, str]:
    """Return the explanation that suits a client, and why."""
    optimizer = training.optimizer
    if optimizer != "sgd":
        # Adam's steps are nearly the sign of the gradient: no gradient on the
        # line from w0 to w1 is parallel to them.
        return "trajectory", f"auto, a surrogate can't explain {optimizer}"
    if training.passes(num_examples) > 1:
        return "surrogate", "auto, sgd over several passes in an order that is not known"
    return "trajectory", "auto, sgd in one pass, whose order is known"

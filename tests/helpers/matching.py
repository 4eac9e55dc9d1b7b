"""Matching objectives of test clients, and the gradients that they should know."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_app.models import known_model
from fl_app.protocol import Knowledge, Observation
from server_strategies.attacks.matching.base import MatchingObjective, Setting
from server_strategies.attacks.matching.distance import CosineDistance, Distance

Objective = TypeVar("Objective", bound=MatchingObjective)


def setting_of(
    observation: Observation, knowledge: Knowledge, distance: type[Distance] = CosineDistance
) -> Setting:
    """Return the setting of an objective, in the precision of the observed weights."""
    model = known_model(knowledge).to(next(iter(observation.w0.values())).dtype)
    return Setting(model, observation, knowledge, "asked for", distance)


def objective_of(
    kind: type[Objective], observation: Observation, knowledge: Knowledge
) -> Objective:
    """Return an objective without the checks and choices of `matching_objective`."""
    return kind(setting_of(observation, knowledge))


def true_gradient(observation: Observation, knowledge: Knowledge, x: Tensor) -> list[Tensor]:
    """Return the gradient at w0 of normalised images, by torch's own autograd."""
    model = known_model(knowledge).to(x.dtype)
    model.load_state_dict(dict(observation.w0))
    F.cross_entropy(model(x), torch.tensor(knowledge.labels)).backward()
    return [w.grad for w in model.parameters()]  # type: ignore[misc]

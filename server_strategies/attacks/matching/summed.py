"""The sum of several clients' updates, which secure aggregation leaves to the server."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fl_app.protocol import Defense, Knowledge, Observation
from server_strategies.attacks.matching.base import MatchingObjective
from server_strategies.attacks.matching.distance import CosineDistance, Distance
from server_strategies.attacks.matching.trajectory import Trajectory


class Summed(MatchingObjective):
    """`Trajectory` of every client in a sum, weighted as FedAvg weighs them.

    ``sum_c n_c (w_K(x_c) - w0) / sum_c n_c`` is compared with the observed
    displacement. Images are numbered client by client, as labels are. What each
    client does to its update before it is summed is not undone: a sum of clipped
    updates, say, is not clipped.

    Parameters
    ----------
    model, observation, knowledge, reason, distance
        See `Trajectory`.

    Raises
    ------
    ValueError
        If the observation does not say how many images each client has.
    """

    name = "sum"

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        knowledge: Knowledge,
        reason: str,
        distance: type[Distance] = CosineDistance,
    ) -> None:
        counts = observation.examples
        if sum(counts) != observation.num_examples:
            raise ValueError(
                f"the clients' examples are {counts}; allowed for explain 'sum': numbers that "
                f"sum to num_examples, {observation.num_examples}"
            )
        self.knowledge, self.reason, self.start = knowledge, reason, None
        self.counts = list(counts)
        layers = Defense(precode=knowledge.defense.precode, dropout=knowledge.defense.dropout)
        self.each = []
        for client, count in enumerate(counts):
            first = sum(counts[:client])
            labels = knowledge.labels and knowledge.labels[first : first + count]
            alone = replace(knowledge, labels=labels, defense=layers)
            seen = replace(observation, num_examples=count, examples=())
            self.each.append(Trajectory(model, seen, alone, reason))
        self.noise = [noise for one in self.each for noise in one.noise]
        self.masks = [mask for one in self.each for mask in one.masks]
        self.unknowns = [unknown for one in self.each for unknown in one.unknowns]
        first_one = self.each[0]
        self.measure = distance
        self.distance = distance([first_one.w1[n] - w for n, w in first_one.w0.items()])

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the distance, shape (), of normalised images (N, C, H, W)."""
        parts = zip(self.each, x.split(self.counts), self.counts, strict=True)
        moved = [
            [count / len(x) * move for move in one.displacement(part, progress)]
            for one, part, count in parts
        ]
        return self.distance([torch.stack(moves).sum(0) for moves in zip(*moved, strict=True)])

    def found_labels(self) -> tuple[int, ...]:
        """See `MatchingObjective`; client by client."""
        return tuple(label for one in self.each for label in one.found_labels())

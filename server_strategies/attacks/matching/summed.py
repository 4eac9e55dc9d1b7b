"""The sum of several clients' updates: all that the server sees under secure aggregation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fl_app.protocol import Defense
from server_strategies.attacks.matching.base import EVERY_SETTING, MatchingObjective, Setting
from server_strategies.attacks.matching.distance import dense
from server_strategies.attacks.matching.trajectory import Trajectory, swappable


class Summed(MatchingObjective):
    """`Trajectory` of every client in a sum, weighted as by FedAvg.

    ``sum_c n_c (w_K(x_c) - w0) / sum_c n_c`` is compared with the observed
    displacement. Images are numbered client by client, as labels are. Defences of
    single updates are not modelled: a sum of clipped updates, say, is not clipped.

    Parameters are `MatchingObjective`'s.

    Raises
    ------
    ValueError
        If the observation does not say how many images each client has.
    """

    name = "sum"
    models = EVERY_SETTING

    def __init__(self, setting: Setting) -> None:
        observation, knowledge = setting.observation, setting.knowledge
        counts = observation.examples
        if sum(counts) != observation.num_examples:
            raise ValueError(
                f"the clients' examples are {counts}; allowed for matching 'sum': numbers that "
                f"sum to num_examples, {observation.num_examples}"
            )
        self.knowledge, self.reason, self.start = knowledge, setting.reason, None
        self.measure = setting.distance
        self.counts = list(counts)
        layers = Defense(precode=knowledge.defense.precode, dropout=knowledge.defense.dropout)
        self.each = []
        for client, count in enumerate(counts):
            first = sum(counts[:client])
            labels = knowledge.labels and knowledge.labels[first : first + count]
            single = replace(
                setting,
                observation=replace(observation, num_examples=count, examples=()),
                knowledge=replace(knowledge, labels=labels, defense=layers),
            )
            self.each.append(Trajectory(single))
        self.noise = [noise for one in self.each for noise in one.noise]
        self.masks = [mask for one in self.each for mask in one.masks]
        self.unknowns = [unknown for one in self.each for unknown in one.unknowns]
        first_one = self.each[0]
        self.distance = self.measure([first_one.w1[n] - w for n, w in first_one.w0.items()])

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the distance, shape (), of normalised images (N, C, H, W)."""
        parts = zip(self.each, x.split(self.counts), self.counts, strict=True)
        weighted = [
            [count / len(x) * change for change in dense(one.displacement(part, progress))]
            for one, part, count in parts
        ]
        return self.distance([torch.stack(each).sum(0) for each in zip(*weighted, strict=True)])

    @property
    def labels(self) -> Tensor:
        """The labels of all clients' images, shape (N,), or their probabilities."""
        return torch.cat([one.labels for one in self.each])

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        for one, part in zip(self.each, labels.split(self.counts), strict=True):
            one.labels = part

    def reassignments(self) -> list[tuple[int, int]]:
        """See `MatchingObjective`: pairs of different clients or steps, as of a trajectory."""
        if self.labels.requires_grad:
            return []
        places = [
            (client, steps)
            for client, one in enumerate(self.each)
            for steps in one.steps_of_images()
        ]
        return swappable(self.labels.tolist(), places, self.knowledge.labels_level == "by-step")

    def found_labels(self) -> tuple[int, ...]:
        """See `MatchingObjective`; client by client."""
        return tuple(label for one in self.each for label in one.found_labels())

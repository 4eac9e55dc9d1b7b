"""A client's update, and the statistics of it that a diagnosis compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.matching.guess import spread


@dataclass(frozen=True)
class Update:
    """An update, and the training that the protocol names for it.

    Attributes
    ----------
    w0, w1 : mapping of str to Tensor
        Weights before and after, by the parameters' names: those that are to be trained.
    training : LocalTraining
    steps : int
        K; of a sum of clients the largest one.
    """

    w0: Mapping[str, Tensor]
    w1: Mapping[str, Tensor]
    training: LocalTraining
    steps: int

    @classmethod
    def of(cls, observation: Observation, training: LocalTraining) -> Update:
        """Return the update that was observed."""
        names = [
            name
            for name in observation.trained
            if training.trains(name) and observation.w0[name].is_floating_point()
        ]
        w0, w1 = ({n: w[n].detach() for n in names} for w in (observation.w0, observation.w1))
        counts = observation.examples or (observation.num_examples,)
        return cls(w0, w1, training, max(len(training.batches(count)) for count in counts))

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """w0 - w1 by parameter."""
        return {name: before - self.w1[name] for name, before in self.w0.items()}

    @cached_property
    def size(self) -> Tensor:
        """|w0 - w1| by coordinate."""
        return torch.cat([part.flatten().abs() for part in self.parts.values()]).float()

    @property
    def longest(self) -> float:
        """The largest coordinate update."""
        return self.size.max().item()

    @property
    def spread(self) -> float:
        """See `guess.spread`."""
        return spread(self.size)

    @property
    def largest_spread(self) -> float:
        """`spread` of the layer of most numbers alone; of the whole update where it has none."""
        layer = max(self.layers.values(), key=len).abs()
        return spread(layer) if layer.any() else self.spread

    @property
    def alike(self) -> float:
        """The share of changed coordinates within 1% of the largest."""
        changed = self.size[self.size > 0]
        return (changed > 0.99 * changed.max()).float().mean().item()

    @property
    def mean_gradient(self) -> float:
        """The norm of SGD's mean gradient, ``|w0 - w1| / (lr K)``."""
        return self.size.norm().item() / (self.training.lr * self.steps)

    @cached_property
    def ties(self) -> int:
        """How many coordinates changed by exactly the largest amount, within rounding."""
        size = torch.cat([part.abs().flatten() for part in self.parts.values()])
        unit = torch.finfo(size.dtype).eps
        error = torch.cat(
            [
                unit * torch.maximum(w.abs(), self.w1[name].abs()).flatten()
                for name, w in self.w0.items()
            ]
        )
        return int((size > size.max() * (1 - 10 * unit) - 2 * error).sum())

    @cached_property
    def layers(self) -> dict[str, Tensor]:
        """w0 - w1 of each module's parameters, flattened, by the module's name."""
        parts: dict[str, list[Tensor]] = {}
        for name, part in self.parts.items():
            parts.setdefault(name.rpartition(".")[0], []).append(part.flatten())
        return {name: torch.cat(each) for name, each in parts.items()}

    def unrounded(self, dtype: torch.dtype) -> float:
        """Return the share of the returned weights, zeros aside, that a shorter format changes."""
        weights = torch.cat([w.flatten() for w in self.w1.values()])
        weights = weights[weights != 0]
        return (weights.to(dtype).to(weights.dtype) != weights).float().mean().item()

    @cached_property
    def zeros(self) -> Zeros:
        """Where no coordinate changed."""
        changed = self.size[self.size > 0].sort().values
        share = 1 - len(changed) / len(self.size)
        smallest, median, longest = (changed[int(q * (len(changed) - 1))] for q in (1e-3, 0.5, 1))
        gap = float(smallest / median) if median < 0.9 * longest else 0.0
        zeros = alive = 0
        for matrix in (u.flatten(1) != 0 for u in self.parts.values() if u.dim() > 1):
            block = matrix[matrix.any(1)][:, matrix.any(0)]
            zeros += int((~block).sum())
            alive += block.numel()
        return Zeros(share, gap, zeros / max(alive, 1))

    @cached_property
    def noise_sigma(self) -> float:
        """The standard deviation of noise in the update; 0 where there is no sign of it.

        From those rows and columns of the weight matrices, of 128 entries or more, that
        changed least: units and inputs that are dead or nearly so. ``sigma = median |u| /
        0.6745`` over the least 1% of them, at least 4, by their median; this selection
        makes it up to 20% too small, measured. They have to pass `_is_noise`. The least of
        all matrices' estimates counts if it is above four times the weights' rounding and
        every row of 64 entries or more changed by at least half of it: noise is in all rows.
        """
        found = []
        for name, u in self.parts.items():
            if u.dim() < 2:
                continue
            w = self.w0[name]
            rounding = 4 * torch.finfo(u.dtype).eps * w.abs().median().item()
            for rows, weights in ((u.flatten(1), w.flatten(1)), (u.flatten(1).T, w.flatten(1).T)):
                if len(rows) < 8 or rows.shape[1] < 128:
                    continue
                chosen = rows.abs().median(1).values.argsort()[: max(4, len(rows) // 100)]
                sigma = rows[chosen].abs().median().item() / 0.6745
                if sigma > rounding and _is_noise(rows[chosen], weights[chosen]):
                    found.append(sigma)
        all_rows = [u.flatten(1) if u.dim() > 1 else u.view(1, -1) for u in self.parts.values()]
        sizes = [r.square().mean(1).sqrt().min().item() for r in all_rows if r.shape[1] >= 64]
        least = min(found, default=0.0)
        return 0.0 if min(sizes, default=0.0) < least / 2 else least


@dataclass(frozen=True)
class Zeros:
    """The coordinates of an update that did not change.

    Attributes
    ----------
    share : float
        Their share of all.
    gap : float
        The size of the smallest 0.1% of the others, as a share of their median; 0 for
        steps that are all alike. Dead units leave whole rows and columns of zeros, and no gap.
    scattered : float
        Their share in rows and columns that are alive.
    """

    share: float
    gap: float
    scattered: float


def _is_noise(rows: Tensor, weights: Tensor) -> bool:
    """Return whether rows of an update, (rows, n), are Gaussian noise.

    They are orthogonal: their mean |cosine| is under twice that of Gaussian
    vectors, ``sqrt(2 / (pi n))``; rows of a gradient are mixtures of a few inputs,
    3.5 to 20 times. They are not along the weights, as weight decay is. Their
    fourth moment over the squared second is 3, within 2.5 to 3.7.
    """
    length = rows.norm(dim=1, keepdim=True)
    if not length.all():
        return False
    unit = rows / length
    cosines = (unit @ unit.T).abs()
    between = (cosines.sum() - cosines.trace()) / (len(unit) * (len(unit) - 1))
    along = torch.cosine_similarity(rows, weights).abs().mean()
    kurtosis = rows.pow(4).mean() / rows.square().mean().square()
    return bool(
        between < 2 * (2 / (torch.pi * rows.shape[1])) ** 0.5
        and along < 0.5
        and 2.5 < kurtosis < 3.7
    )

"""Several restarts of the same reconstruction, optimised jointly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server_strategies.attacks.matching.base import MatchingObjective


class Restarts(MatchingObjective):
    """One objective for each restart; the result is the one of least matching loss.

    The loss is the mean of theirs. Each has its own unknowns and its own part of the
    candidates.

    Parameters
    ----------
    each : sequence of MatchingObjective
        1 or more, of the same update.
    """

    def __init__(self, each: Sequence[MatchingObjective]) -> None:
        self.each = each
        self.best = self.each[0]
        self.name, self.reason = self.best.name, self.best.reason
        self.knowledge = self.best.knowledge
        self.restart, self.measure = self.best.restart, self.best.measure
        self.candidates = len(self.each) * self.best.candidates
        self.unknowns = [unknown for one in self.each for unknown in one.unknowns]
        starts = [one.start for one in self.each if one.start is not None]
        self.start = torch.cat(starts) if starts else None

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the mean matching loss, shape (), of candidates (candidates * N, C, H, W)."""
        parts = zip(self.each, x.chunk(len(self.each)), strict=True)
        losses = torch.stack([one(part, progress) for one, part in parts])
        self.losses = losses.detach()
        return losses.mean()

    def found_images(self, x: Tensor) -> Tensor:
        """Return the images, (N, C, H, W), of the restart whose last matching loss is least."""
        best = int(self.losses.argmin())
        self.best = self.each[best]
        return self.best.found_images(x.chunk(len(self.each))[best])

    def found_labels(self) -> tuple[int, ...]:
        """See `MatchingObjective`; of the best restart."""
        return self.best.found_labels()

    def position(self) -> float | None:
        """See `MatchingObjective`; of the best restart."""
        return self.best.position()

    def pace(self) -> Tensor | None:
        """See `MatchingObjective`."""
        paces = [one.pace() for one in self.each]
        known = [pace for pace in paces if pace is not None]
        return torch.cat(known) if known else None

"""What a defence leaves known of an update: the set of updates that it turns into the observed one.

The distance of a candidate from that set is what speaks against it, not its distance
from the observed update, which the truth itself does not have. See docs/adaptive.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fl_app.protocol import Defense

_AT_BOUND = 1e-3  # how near the bound a move counts as clipped, relatively: weights are rounded
_SMALL = 0.9  # share of a step's move up to which Adam's gradient is at most 9 of its epsilons


@dataclass(frozen=True)
class Consistent:
    """The updates that a defence turns into the observed one: a box, up to noise.

    Attributes
    ----------
    seen : sequence of Tensor
        The observed update b, one tensor a parameter.
    low, high : sequence of Tensor
        Bounds of the true update by coordinate, in the same pieces; infinite where
        there is none.
    sigma : float
        Standard deviation of the noise in b; 0: none.
    rescale : bool
        Whether a candidate's length says nothing, so that it takes that of b.
    """

    seen: Sequence[Tensor]
    low: Sequence[Tensor]
    high: Sequence[Tensor]
    sigma: float
    rescale: bool

    def nearest(self, candidate: Sequence[Tensor]) -> list[Tensor]:
        """Return P(a), the consistent update nearest to a candidate a; noise is not undone."""
        bounds = zip(candidate, self.low, self.high, strict=True)
        return [torch.minimum(torch.maximum(a, low), high) for a, low, high in bounds]

    def as_observed(self, candidate: Sequence[Tensor]) -> list[Tensor]:
        """Return ``b + a - P(a)``: a candidate with all of it that is consistent as observed.

        Softly: ``P(a) - b`` counts by ``r^2 / (r^2 + s^2)``, with s the standard
        deviation of a uniform number between the bounds, and r the root mean square
        of ``a - P(a)`` where the tensor's moves are known best. A coordinate is
        known to s, and until the others are fitted as well it speaks as they do: a
        flat loss would only be slower to descend. At the truth r is 0.

        Parameters
        ----------
        candidate : sequence of Tensor
            An update a, in the same pieces as `seen`.
        """
        if self.rescale:
            scale = self._length(self.seen) / self._length(candidate)
            candidate = [a * scale for a in candidate]
        if not self.hidden:  # then P(a) is b
            return list(candidate)
        nearest = self.nearest(candidate)
        found = []
        for a, p, b, low, high in zip(
            candidate, nearest, self.seen, self.low, self.high, strict=True
        ):
            told = (b != 0) & (high - low).isfinite()
            off = (torch.where(told, a - p, 0).square().sum() / told.sum().clamp_min(1)).detach()
            weight = off / (off + (high - low).square() / 12 + 1e-30)
            found.append(b + (a - p) + weight * (p - b))
        return found

    def exact(self) -> list[Tensor]:
        """Return where the observed update is the true one, of bool, in the pieces of `seen`."""
        return [low == high for low, high in zip(self.low, self.high, strict=True)]

    def sizes_told(self, move: float) -> list[Tensor]:
        """Return where Adam's gradient follows from the move, of bool, in the pieces of `seen`.

        Where the observed move is the true one, or set to zero and too small for a
        single step's: then the gradient was next to nothing.

        Parameters
        ----------
        move : float
            That of one step along a gradient far above Adam's epsilon, > 0.
        """
        small = [
            (b == 0) & (high < _SMALL * move) for b, high in zip(self.seen, self.high, strict=True)
        ]
        return [exact | part for exact, part in zip(self.exact(), small, strict=True)]

    @cached_property
    def hidden(self) -> bool:
        """Whether the observed update is not the true one anywhere, but for its length."""
        return not all(exact.all() for exact in self.exact())

    def in_units(self, unit: float, zero: Sequence[Tensor]) -> Consistent:
        """Return the same of ``u / unit - zero`` in the place of the update u.

        Parameters
        ----------
        unit : float
            > 0.
        zero : sequence of Tensor
        """
        seen, low, high = (
            [part / unit - origin for part, origin in zip(parts, zero, strict=True)]
            for parts in (self.seen, self.low, self.high)
        )
        return replace(self, seen=seen, low=low, high=high, sigma=self.sigma / unit)

    def _length(self, update: Sequence[Tensor]) -> Tensor:
        """Return an update's length where b tells the size of a move; 1 where it does nowhere."""
        squares = [
            torch.where((b != 0) & (high - low).isfinite(), part, 0).square().sum()
            for part, b, low, high in zip(update, self.seen, self.low, self.high, strict=True)
        ]
        square = torch.stack(squares).sum()
        return torch.where(square > 0, square, 1).sqrt()


def consistent(
    observed: Sequence[Tensor], defense: Defense, rescale: bool = False
) -> Consistent | None:
    """Return the updates that a defence turns into the observed one; None: only that itself.

    - `clip` by value: a coordinate at the bound says that it is at least that; by
      norm: an update of that norm says its direction only.
    - `sparsify`: zero says that the magnitude is at most the least one that was kept.
    - `quantize`: nothing. Its rounding is small noise that hardly depends on the
      update; half a step of slack would only make the loss flatter.
    - `noise`: no bound, as it has none; where it hides what was clipped or set to
      zero, moves within two sigma of the bound, and as many of the least as the
      defence sets to zero, count as such.

    Parameters
    ----------
    observed : sequence of Tensor
        The observed update b or its negative, one tensor a parameter.
    defense : Defense
    rescale : bool
        Whether candidates are of unknown length.
    """
    if not (defense.clip or defense.sparsify or defense.sigma):
        return None
    size = torch.cat([b.detach().flatten() for b in observed]).abs()
    sigma = noise_sigma(size, defense)
    bound = defense.clip if defense.clip and defense.clip_by == "value" else math.inf
    bound = bound * (1 - _AT_BOUND)
    threshold = _threshold(size, defense)
    low, high = [], []
    for b in observed:
        zeroed = b.abs() <= (threshold if sigma else 0)
        at_most = torch.where(zeroed, threshold, b)
        at_least = torch.where(zeroed, -threshold, b)
        clipped = b.abs() >= bound - 2 * sigma
        at_most = torch.where(clipped & (b > 0), math.inf, at_most)
        at_least = torch.where(clipped & (b > 0), at_least.clamp_max(bound), at_least)
        at_least = torch.where(clipped & (b < 0), -math.inf, at_least)
        at_most = torch.where(clipped & (b < 0), at_most.clamp_min(-bound), at_most)
        low.append(at_least)
        high.append(at_most)
    return Consistent(observed, low, high, sigma, rescale or norm_clipped(size, defense))


def noise_sigma(size: Tensor, defense: Defense) -> float:
    """Return the standard deviation of the noise in an update, in the update's units.

    Parameters
    ----------
    size : Tensor
        |b| by coordinate of the observed update, noise included.
    defense : Defense
    """
    if not defense.relative:
        return defense.sigma
    rms = size.square().mean().sqrt().item()
    return rms * defense.sigma / math.sqrt(1 + defense.sigma**2)


def norm_clipped(size: Tensor, defense: Defense) -> bool:
    """Say whether the clip of an update's norm scaled it down.

    Parameters
    ----------
    size : Tensor
        |b| by coordinate of the observed update.
    defense : Defense
    """
    if not defense.clip or defense.clip_by != "norm":
        return False
    # Sparsification, noise and quantisation change the norm after the clip, mostly by little.
    return bool(size.norm() >= defense.clip * (1 - _AT_BOUND)) or defense.sparsify > 0


def hidden_size(update: Sequence[Tensor], defense: Defense) -> str:
    """Say what keeps an update from telling sizes to the weights' rounding; nothing if it does.

    What an inversion of Adam's epsilon needs, and its fingerprints do. A clip by
    value leaves the sizes below its bound.

    Parameters
    ----------
    update : sequence of Tensor
    defense : Defense
    """
    size = torch.cat([b.detach().flatten() for b in update]).abs()
    if defense.noise != "none":
        return f"the client adds {defense.noise} noise"
    if defense.quantize != "none":
        return f"the client sends {defense.quantize}"
    if norm_clipped(size, defense):
        return "the client clipped the update's norm"
    return ""


def noise_share(update: Sequence[Tensor], defense: Defense) -> float:
    """Return which share of an observed update's square the noise makes up, in [0, 1].

    Parameters
    ----------
    update : sequence of Tensor
        Noise included.
    defense : Defense
    """
    size = torch.cat([b.detach().flatten() for b in update]).abs()
    return noise_part(size, noise_sigma(size, defense)) if size.any() else 0.0


def noise_part(size: Tensor, sigma: float) -> float:
    """Return the share of an update's square that noise makes up, ``n sigma^2 / |u|^2``, at most 1.

    Parameters
    ----------
    size : Tensor, shape (n,)
        |w0 - w1| by coordinate, noise included.
    sigma : float
    """
    return min(1.0, size.numel() * sigma**2 / size.square().sum().item())


def _threshold(size: Tensor, defense: Defense) -> float:
    """Return the magnitude below which a client set moves to zero; 0: it set none."""
    if not defense.sparsify:
        return 0.0
    if defense.sigma:  # zeros are noise now: the least moves stand for them
        return size.kthvalue(math.ceil(defense.sparsify * len(size))).values.item()
    moved = size[size > 0]
    return moved.min().item() if len(moved) else 0.0

"""The updates that a known defence turns into the observed one.

A candidate is compared with the nearest of them, not with the observed update itself:
the true update differs from that, too. See docs/adaptive.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fl_app.protocol import Defense

_AT_BOUND = 1e-3  # relative distance from the bound of a clipped coordinate: weights are rounded
_PILE = 1e-4  # share of an update's coordinates that are as large as its largest, if it was clipped
_EDGE = 1e-3  # and of those from the least kept one up to its double, if it was pruned
_SMALL = 0.9  # share of a step's coordinate update, up to which Adam's gradient is below 9 epsilons


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
        Whether the length of candidates is unknown, so that they are scaled to that of b.
    """

    seen: Sequence[Tensor]
    low: Sequence[Tensor]
    high: Sequence[Tensor]
    sigma: float
    rescale: bool

    def nearest(self, candidate: Sequence[Tensor]) -> list[Tensor]:
        """Return P(a), the consistent update nearest to a candidate a; noise is not removed."""
        bounds = zip(candidate, self.low, self.high, strict=True)
        return [torch.minimum(torch.maximum(a, low), high) for a, low, high in bounds]

    def as_observed(self, candidate: Sequence[Tensor]) -> list[Tensor]:
        """Return ``b + a - P(a)``: a candidate whose consistent part equals the observed update.

        Softly: ``P(a) - b`` counts by ``r^2 / (r^2 + s^2)``, with s the standard
        deviation of a uniform number between the bounds, and r the root mean square
        of ``a - P(a)`` where the tensor's coordinates have finite bounds. A coordinate is
        known up to s. Until the others are fitted to s as well, it counts as they do,
        because a flat loss would be slower to descend. At the true update r is 0.

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
            sized = (b != 0) & (high - low).isfinite()
            off = (torch.where(sized, a - p, 0).square().sum() / sized.sum().clamp_min(1)).detach()
            weight = off / (off + (high - low).square() / 12 + 1e-30)
            found.append(b + (a - p) + weight * (p - b))
        return found

    def exact(self) -> list[Tensor]:
        """Return where the observed update is the true one, of bool, in the pieces of `seen`."""
        return [low == high for low, high in zip(self.low, self.high, strict=True)]

    def sizes_known(self, step: float) -> list[Tensor]:
        """Return where Adam's gradient follows from the update, of bool, in the pieces of `seen`.

        It does where the observed coordinate is the true one. It also does where the
        coordinate was set to zero and was smaller than a single step: then the gradient
        was nearly zero.

        Parameters
        ----------
        step : float
            Update by one step along a gradient far above Adam's epsilon, > 0.
        """
        small = [
            (b == 0) & (high < _SMALL * step) for b, high in zip(self.seen, self.high, strict=True)
        ]
        return [exact | part for exact, part in zip(self.exact(), small, strict=True)]

    @cached_property
    def hidden(self) -> bool:
        """Whether the observed update differs from the true one anywhere, up to its length."""
        return not all(exact.all() for exact in self.exact())

    def in_units(self, unit: float, zero: Sequence[Tensor]) -> Consistent:
        """Return the same for ``u / unit - zero`` instead of the update u.

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
        """Return an update's length over coordinates whose size b shows; 1 if there are none."""
        squares = [
            torch.where((b != 0) & (high - low).isfinite(), part, 0).square().sum()
            for part, b, low, high in zip(update, self.seen, self.low, self.high, strict=True)
        ]
        square = torch.stack(squares).sum()
        return torch.where(square > 0, square, 1).sqrt()


def consistent(
    observed: Sequence[Tensor], defense: Defense, rescale: bool = False
) -> Consistent | None:
    """Return the updates that a defence turns into the observed one; None: only itself.

    - `clip` by value: a coordinate at the bound was at least that large. By norm: an
      update of that norm shows its direction only.
    - `sparsify`: a zero was at most as large as the least coordinate that was kept.
    - `quantize`: no bounds. Its rounding is small noise that hardly depends on the
      update, and half a step of tolerance would only make the loss flatter.
    - `noise`: no bounds, since it has none. It hides which coordinates were clipped or
      set to zero. Those within two sigma of the bound count as clipped, and as many of
      the smallest as the defence sets to zero count as zero.

    Parameters
    ----------
    observed : sequence of Tensor
        The observed update b or its negative, one tensor a parameter.
    defense : Defense
    rescale : bool
        Whether the length of candidates is unknown.
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


def estimated(update: Sequence[Tensor], known: Defense, adaptive: bool = False) -> Defense:
    """Return a defence with the clipping and the pruning that an update itself shows.

    As the authors of GGL estimate them (Li et al., 2022): the bound of a norm is the update's
    norm, and the share that was set to zero is that of its zeros, which is an upper bound where
    training left coordinates unchanged. They take the kind of the defence for known. Here
    clipping by value and pruning are also seen where they are not: many coordinates are
    then as large as the largest, or many lie just above the least that is not zero. Clipping by
    norm leaves no trace.

    Parameters
    ----------
    update : sequence of Tensor
        The observed one, one tensor a parameter.
    known : Defense
        What is known of the defence. Where it adds noise or rounds, it is returned: both
        hide the zeros and the bound.
    adaptive : bool
        Whether the client's optimiser scales coordinates, by which many become as large as the
        largest: clipping by value is then not seen.
    """
    size = torch.cat([part.detach().flatten() for part in update]).abs()
    changed = size[size > 0]
    hidden = known.noise != "none" or known.quantize != "none" or known.local_dp or known.custom
    if hidden or not len(changed):
        return known
    clip, clip_by, sparsify = known.clip, known.clip_by, known.sparsify
    largest, least = changed.max(), changed.min()
    if clip and clip_by == "norm":
        clip = size.norm().item()
    elif clip or (not adaptive and _many(size >= largest * (1 - _AT_BOUND), _PILE)):
        clip, clip_by = largest.item(), "value"
    if sparsify or _many((size > 0) & (size <= 2 * least), _EDGE):
        sparsify = 1 - len(changed) / len(size)
    return replace(known, clip=clip, clip_by=clip_by, sparsify=sparsify)


def _many(chosen: Tensor, share: float) -> bool:
    """Return whether a share of coordinates, and ten of them, are chosen."""
    return int(chosen.sum()) >= max(10, share * chosen.numel())


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
    """Return whether clipping by norm scaled an update down.

    Parameters
    ----------
    size : Tensor
        |b| by coordinate of the observed update.
    defense : Defense
    """
    if not defense.clip or defense.clip_by != "norm":
        return False
    # Sparsification, noise and quantisation change the norm after clipping, mostly a little.
    return bool(size.norm() >= defense.clip * (1 - _AT_BOUND)) or defense.sparsify > 0


def hidden_size(update: Sequence[Tensor], defense: Defense) -> str:
    """Return what hides the exact size of coordinate updates; empty: nothing does.

    An inversion of Adam's epsilon needs sizes exact up to the weights' rounding, and so
    do fingerprints. Clipping by value keeps the sizes below its bound.

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
    if defense.custom:
        return f"the client applies {defense.custom}, a plug-in's defence"
    if norm_clipped(size, defense):
        return "the client clipped the update's norm"
    return ""


def noise_share(update: Sequence[Tensor], defense: Defense) -> float:
    """Return the noise's share of an observed update's square, in [0, 1].

    Parameters
    ----------
    update : sequence of Tensor
        Noise included.
    defense : Defense
    """
    size = torch.cat([b.detach().flatten() for b in update]).abs()
    return noise_part(size, noise_sigma(size, defense)) if size.any() else 0.0


def noise_part(size: Tensor, sigma: float) -> float:
    """Return the noise's share of an update's square, ``n sigma^2 / |u|^2``, at most 1.

    Parameters
    ----------
    size : Tensor, shape (n,)
        |w0 - w1| by coordinate, noise included.
    sigma : float
    """
    return min(1.0, size.numel() * sigma**2 / size.square().sum().item())


def _threshold(size: Tensor, defense: Defense) -> float:
    """Return the magnitude below which a client set coordinates to zero; 0: it set none."""
    if not defense.sparsify:
        return 0.0
    if defense.sigma:  # zeros became noise: take as many of the smallest coordinates
        return size.kthvalue(math.ceil(defense.sparsify * len(size))).values.item()
    changed = size[size > 0]
    return changed.min().item() if len(changed) else 0.0

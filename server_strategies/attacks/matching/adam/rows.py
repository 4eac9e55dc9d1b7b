"""The features of the image that a step's gradient rows are of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server_strategies.attacks.matching.adam.fingerprints import Fingerprint

_EXPLAINED = 0.1  # share of a row's square up to which it is made of features that are known
_BOUND = 0.3  # how much a feature counts that is below its bound
_FINEST = 1e-3  # misfit below which weights no longer change


@dataclass(frozen=True)
class RowFeatures:
    """What a layer's gradient rows of one local step tell of its image's features.

    Attributes
    ----------
    name : str
        The layer's weight.
    values : Tensor, shape (1, D)
        Features of the image, scaled to length 1; 0 where they are not known.
    spread : Tensor, shape (1, D)
        Their standard deviation; infinite where they are not known.
    least : Tensor, shape (1, D)
        Lower bounds of features that are not known; 0: none.
    """

    name: str
    values: Tensor
    spread: Tensor
    least: Tensor

    def scaled(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features at the length of others, and how much each counts.

        ``1 / (1 + spread^2 / (misfit / D))`` in [0, 1]: a coordinate with a larger error than
        the fit's so far counts less, see `Fingerprint.weighted`.

        Parameters
        ----------
        given : Tensor, shape (1, D)
        """
        # Where features are not zero: by all of them the length would shrink while images are
        # wrong. The length of least relative misfit grows instead.
        there = given * (self.values > 0)
        dots = (there * self.values).sum(1, keepdim=True).clamp_min(1e-12)
        length = there.square().sum(1, keepdim=True) / dots + 1e-12
        misfit = ((given / length - self.values) * self.spread.isfinite()).square()
        misfit = misfit.sum(1, keepdim=True)
        square = misfit.clamp(_FINEST, 1) / self.values.shape[1]
        weight = (1 + self.spread.square() / square).reciprocal()
        # Below its bound a feature is pulled up to it; above, nothing is known of it.
        low = self.least * length
        wanted = torch.where(self.least > 0, torch.maximum(given, low), self.values * length)
        return wanted, torch.where(self.least > 0, _BOUND * (given < low), weight)


def row_features(seen: Fingerprint) -> RowFeatures:
    """Return the features of an image that was a local step's batch alone, by the step's rows.

    Every row is a multiple of them. Rows with many zeros have fewer large gradients, so the
    first sets the scale, and the coordinates of those that agree with it are averaged by
    their spread.

    Parameters
    ----------
    seen : Fingerprint
        Of a step of one image.
    """
    value = weight = bound = None
    zeros = ((seen.gradient == 0) & seen.known).sum(1)
    for row in zeros.argsort(descending=True, stable=True).tolist():
        g, known = seen.gradient[row], seen.known[row]
        if not g[known].any():
            continue
        # A coordinate of zero is exact, but no average needs more than this.
        spread = seen.spread[row].clamp_min(0.01 * float(g.square().mean().sqrt()) + 1e-30)
        own = torch.where(known, spread.square().reciprocal(), 0)
        if value is None or weight is None or bound is None:
            sign = g.sum().sign()  # behind a ReLU features are not negative
            value, weight, bound = g * sign, own, (seen.least[row] * sign).clamp_min(0)
            continue
        factor, left = _fit(g, own, value, weight)
        if left < _EXPLAINED:
            added = own * factor.square()
            total = weight + added
            value = (weight * value + added * g / factor) / total.clamp_min(1e-30)
            weight, bound = total, torch.maximum(bound, (seen.least[row] / factor).clamp_min(0))
    assert value is not None and weight is not None and bound is not None
    length = value.norm()
    least = torch.where(weight > 0, 0, bound)
    parts = (value / length, weight.rsqrt() / length, least / length)
    return RowFeatures(seen.name, *(part[None] for part in parts))


def _fit(row: Tensor, weight: Tensor, value: Tensor, known: Tensor) -> tuple[Tensor, float]:
    """Return the coefficient of a row in features, and the share of it that is left."""
    # A coordinate counts as far as both are known well.
    spread = weight.reciprocal() + known.reciprocal()
    both = (1 + spread / row.square().mean()).reciprocal()
    dots, square = ((value * both * other).double().sum() for other in (row, value))
    part = (dots / square).to(row)
    left = row - part * value
    return part, float((both * left.square()).sum() / (both * row.square()).sum())

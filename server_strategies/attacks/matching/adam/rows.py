"""The features of single images in a step's gradient rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server_strategies.attacks.matching.adam.fingerprints import Fingerprint

_EXPLAINED = 0.1  # share of a row's square up to which it is made of features that are known
_BOUND = 0.3  # how much a feature counts that is below its bound
_FINEST = 1e-3  # misfit below which weights no longer change


@dataclass(frozen=True)
class RowFeatures:
    """What a layer's gradient rows of one local step tell of its images' features.

    Attributes
    ----------
    name : str
        The layer's weight.
    values : Tensor, shape (m, D)
        Features of m images, scaled to length 1; 0 where they are not known.
    spread : Tensor, shape (m, D)
        Their standard deviation; infinite where they are not known.
    least : Tensor, shape (m, D)
        Lower bounds of features that are not known; 0: none.
    """

    name: str
    values: Tensor
    spread: Tensor
    least: Tensor

    def of(self, chosen: Tensor) -> RowFeatures:
        """Return the features of some of the images, marked in `chosen`, shape (m,) of bool."""
        return replace(
            self,
            values=self.values[chosen],
            spread=self.spread[chosen],
            least=self.least[chosen],
        )

    def scaled(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features at the length of others, and how much each counts.

        ``1 / (1 + spread^2 / (misfit / D))`` in [0, 1]: a coordinate with a larger error than
        the fit's so far counts less, see `Fingerprint.weighted`.

        Parameters
        ----------
        given : Tensor, shape (m, D)
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


def row_features(seen: Fingerprint, most: int) -> RowFeatures:
    """Return the features that rows of one local step are made of.

    A row is ``sum_n d_n a_n`` over the images that activate its unit, most often one. Rows
    with many zeros are of few images, so they come first. One that the features found so
    far explain adds to none of them, unless it is of one image alone: then its coordinates
    are averaged with that image's, by their spread.

    Parameters
    ----------
    seen : Fingerprint
    most : int
        Images of the step, B.
    """
    values: list[Tensor] = []
    weights: list[Tensor] = []
    bounds: list[Tensor] = []
    zeros = ((seen.gradient == 0) & seen.known).sum(1)
    for row in zeros.argsort(descending=True, stable=True).tolist():
        g, known = seen.gradient[row], seen.known[row]
        if not g[known].any():
            continue
        # A coordinate of zero is exact, but no average needs more than this.
        spread = seen.spread[row].clamp_min(0.01 * float(g.square().mean().sqrt()) + 1e-30)
        weight = torch.where(known, spread.square().reciprocal(), 0)
        alone = [_fit(g, weight, [a], [w]) for a, w in zip(values, weights, strict=True)]
        best = min(range(len(alone)), key=lambda i: alone[i][1], default=-1)
        if best >= 0 and alone[best][1] < _EXPLAINED:
            factor = alone[best][0][0]
            added = weight * factor.square()
            total = weights[best] + added
            mean = (weights[best] * values[best] + added * g / factor) / total.clamp_min(1e-30)
            values[best], weights[best] = mean, total
            bounds[best] = torch.maximum(bounds[best], (seen.least[row] / factor).clamp_min(0))
        elif len(values) < most and (
            not values or _fit(g, weight, values, weights)[1] > _EXPLAINED
        ):
            sign = g.sum().sign()  # behind a ReLU features are not negative
            values.append(g * sign)
            weights.append(weight)
            bounds.append((seen.least[row] * sign).clamp_min(0))
    a, w = torch.stack(values), torch.stack(weights)
    least = torch.where(w > 0, 0, torch.stack(bounds))
    length = a.norm(dim=1, keepdim=True)
    return RowFeatures(seen.name, a / length, w.rsqrt() / length, least / length)


def _fit(
    row: Tensor, weight: Tensor, values: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, float]:
    """Return the coefficients of a row in features, and the share of it that is left."""
    a = torch.stack(values)
    # A coordinate counts as far as both are known well.
    spread = weight.reciprocal() + torch.stack(weights).reciprocal().sum(0)
    both = (1 + spread / row.square().mean()).reciprocal()
    gram = (a * both) @ a.T
    parts = torch.linalg.lstsq(gram.double(), ((a * both) @ row).double()[:, None]).solution[:, 0]
    left = row - parts.to(row) @ a
    return parts.to(row), float((both * left.square()).sum() / (both * row.square()).sum())

"""The features of images by the update that Adam makes of their gradients.

In a local step a linear layer's gradient is ``sum_n d_n [a_n, 1]'`` over its images: the
slopes of the loss at the layer's output times its inputs. Adam makes of K such gradients
one update, coordinate by coordinate: what unit i and input j move depends on the K
numbers ``sum_n d_ni a_nj`` alone. So the update holds far more numbers than the pairs of
factors that it was made from, and these follow from it, whatever the labels are. Behind
a ReLU most factors are zero, and which are shows at once:

- a coordinate that did not move had no gradient in any step;
- one with a gradient in a single step moves by that step's own length, see
  `single_step_updates`, but for what Adam's epsilon takes off, by which the size of its
  gradient is known (see `adam.fingerprints`);
- one with gradients in two steps or more moves by a function of their ratios.

`components` tells the images of a batch apart. Sizes give a first pair of factors for
each, others follow from those that are known, and least squares over all coordinates at
once refines them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.adam.fingerprints import (
    inverted,
    single_step_terms,
    single_step_updates,
)
from server_strategies.attacks.matching.low_rank.components import opened_units
from server_strategies.attacks.matching.low_rank.gates import kinds, opened_and_there
from server_strategies.attacks.matching.optimizers import BETA1, BETA2, EPS

_SEEN = 0.3  # share of the images that has to show at all
_LEAST = 8  # inputs at a step's length, by which its unit counts as open at first
_TYPICAL = 0.2  # of the inputs that a step's units usually have at its length
_SWEEPS = 50  # of non-negative least squares
_FLOOR = 1e-2  # relative error of a size, at the least
_ANCHORED = 0.1  # relative error up to which a size, or a factor, is known
_CLEAR = 0.05  # relative error of sizes that images are told apart by
_SMALLEST = 20.0  # epsilons that a gradient is at least: smaller ones are mostly no single step's
_STRAYS = 3.0  # standard deviations from which a size counts less
_LARGE = 0.9  # quantile of an image's features that one of unknown size is taken for
_FITS = 60  # alternations of the fit to sizes
_TRIED = (-6.0, 4.0, 0.2)  # logarithms of features that are tried, from the median's, and spacing
_PEELS = 6  # rounds in which features follow from those that are known
_WITNESSES = 2  # coordinates that agree with a feature, at the least
_MOST = 0.6  # share of an input's coordinates that agree
_ALIKE = 1e-3  # difference of updates up to which they agree
_WIDTHS = (1e-3, 1e-4)  # residuals from which coordinates count less, first and last
_ROUNDS = 2  # in which inputs follow from each other, and are fitted
_FEW = 0.3  # share of the units that images usually open, below which one does not show
_GONE = 9.0  # by which a feature's logarithm is below the median, if there is none
_STEPS = 6  # least-squares steps for the inputs, a round
_ROWS = 3  # for the units
_SAMPLE = 1000  # inputs by which the units are fitted
_WIDE = 3.0  # standard deviation of a feature's logarithm, before anything is known
_CHUNK = 512  # inputs at a time, whose coordinates fit a CPU's cache
_PRECISE = 0.3  # relative error of a feature up to which it counts as known
_OUTLIERS = 0.1  # share of an input's coordinates, in the units of an image, that may not fit


@dataclass(frozen=True)
class StepFactors:
    """What goes into a linear layer, and the slopes at its output, by image in training order.

    Attributes
    ----------
    features : Tensor of float64, shape (N, in)
        Scaled to length 1; 0 of images that don't show.
    spread : Tensor of float64, shape (N, in)
        Their standard deviation; infinite where they are hardly known, 0 where they are 0.
    slopes : Tensor of float64, shape (N, out)
        Of the step's loss at the layer's output, times the length of the features. A product
        of both is known, not which part of it is whose.
    found : Tensor of bool, shape (N,)
        Which images show. The order of a step's images is arbitrary.
    """

    features: Tensor
    spread: Tensor
    slopes: Tensor
    found: Tensor


def step_factors(
    w0: tuple[Tensor, Tensor],
    w1: tuple[Tensor, Tensor],
    training: LocalTraining,
    sizes: Sequence[int],
    until: float = math.inf,
) -> StepFactors | None:
    """Return the factors of the gradients of a linear layer; None: they don't show.

    Parameters
    ----------
    w0, w1 : tuple of Tensor (out, in) and Tensor (out,)
        The layer's weight and bias before and after; its inputs are not negative.
    training : LocalTraining
        With Adam or AdamW; Adam's weight decay changes every coordinate in every step, so
        that nothing shows.
    sizes : sequence of int
        Images by local step; together N.
    until : float
        By `time.monotonic`, after which the search ends: nothing shows in time.
    """
    if training.optimizer == "adam" and training.weight_decay:
        return None
    steps = len(sizes)
    before, after = (torch.cat([w, b[:, None]], 1) for w, b in (w0, w1))
    decay = training.lr * training.weight_decay
    # The client multiplies by a factor of the weights' type, and rounds after every step.
    left, rested = torch.tensor(1 - decay).to(before), before
    for _ in range(steps):
        rested = rested * left
    update = (before.double() * left.double() ** steps - after) / training.lr
    unit = torch.finfo(before.dtype).eps / 2
    rounding = unit * before.double().abs() * steps**0.5 / training.lr
    update = torch.where((rested - after).abs() > rounding * training.lr, update, 0)
    lengths = single_step_updates(steps, decay).to(update)
    # Adam's own arithmetic adds an error of about five units.
    error = rounding + 5 * unit * lengths.max()
    of = torch.repeat_interleave(torch.arange(steps), torch.tensor(list(sizes))).to(update.device)
    live, wide = update.any(1), update.any(0)
    layer = _Seen(update[live][:, wide], error[live][:, wide], of, steps, decay)
    kind = kinds(layer.update, lengths)
    first = _first_units(layer, kind, sizes, until)
    # What follows takes minutes for many images, and adds none to those that are seen here.
    if int(first.any(1).sum()) < _SEEN * len(of):
        return None
    signs, there = opened_and_there(layer.update, kind, first, of, until)
    # An image that shows has units of its own, and inputs.
    found = signs.any(1) & there[:, :-1].any(1)
    if int(found.sum()) < _SEEN * len(of) or time.monotonic() > until:
        return None
    seen = replace(layer, of=of[found], signs=signs[found], there=there[found])
    fit = _fitted(seen)
    known = fit.there & (fit.spread < _PRECISE)
    # Features of unknown size are large, but not larger than the others.
    most = [_quantile(row, of, _LARGE) for row, of in zip(fit.inputs, known, strict=True)]
    inputs = torch.where(known, fit.inputs, torch.minimum(fit.inputs, torch.stack(most)[:, None]))
    features, deviation = (update.new_zeros(len(of), update.shape[1]) for _ in range(2))
    slopes = update.new_zeros(len(of), len(update))
    features[found.nonzero(), wide.nonzero()[:, 0]] = inputs.exp()
    off = torch.where(fit.there, torch.where(known, fit.spread, torch.inf), 0)
    deviation[found.nonzero(), wide.nonzero()[:, 0]] = off
    slopes[found.nonzero(), live.nonzero()[:, 0]] = seen.signs * fit.units.exp()
    features = features[:, :-1]
    length = features.norm(dim=1, keepdim=True).clamp_min(1e-300)
    features = features / length
    deviation = torch.where(features > 0, deviation[:, :-1] * features, 0)
    # An image of few units is one that the others leave over.
    count = (slopes != 0).sum(1)
    found[found.clone()] &= known[:, :-1].any(1)
    found &= count > _FEW * count[found].double().median()
    if not bool(found.any()):
        return None
    return StepFactors(features, deviation, slopes * length, found)


def _first_units(layer: _Seen, kind: Tensor, sizes: Sequence[int], until: float) -> Tensor:
    """Return which units each image is first taken to open, shape (N, R) of bool."""
    steps = range(len(sizes))
    if max(sizes) == 1:
        counts = torch.stack([(kind == step + 1).sum(1) for step in steps])
        typical = torch.stack([_filled(row.double(), row >= _LEAST) for row in counts])
        # By chance a few ratios of two steps have the length of a third, of a few inputs.
        return (counts >= _LEAST) & (counts > _TYPICAL * typical.median(1, keepdim=True).values)
    parts = []
    for step, count in enumerate(sizes):
        size, spread, known = _sizes(layer, kind == step + 1, step)
        known &= spread < _CLEAR * size
        found = opened_units(
            size.clamp_min(1e-300).log().cpu().numpy(),
            layer.update.sign().cpu().numpy(),
            known.cpu().numpy(),
            count,
            until,
        )
        units = torch.zeros(count, len(kind), dtype=torch.bool, device=kind.device)
        units[: len(found)] = torch.from_numpy(found).to(kind.device)
        parts.append(units)
    return torch.cat(parts)


def _sizes(layer: _Seen, here: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sizes of a step's gradients, their spread, and where they are known, all (R, C).

    Parameters
    ----------
    layer : _Seen
    here : Tensor of bool, shape (R, C)
        Where the step alone has a gradient.
    step : int
    """
    a, b = (part.to(layer.update) for part in single_step_terms(step, layer.steps, layer.decay))
    found = inverted(layer.update[here].abs(), a, b, layer.error[here])
    size, spread = (torch.zeros_like(layer.update).masked_scatter(here, part) for part in found)
    # Near the limit those pass that errors make small.
    return size, spread, here & (size > _SMALLEST * EPS) & (spread < _ANCHORED * size)


@dataclass(frozen=True)
class _Seen:
    """A layer's update in units of lr: R units and C inputs that have gradients.

    Attributes
    ----------
    update, error : Tensor, shape (R, C)
    of : Tensor of int64, shape (N,)
        The local steps of images.
    steps : int
        K.
    decay : float
        lr times AdamW's weight decay.
    signs : Tensor, shape (N, R)
    there : Tensor of bool, shape (N, C)
        See `opened_and_there`.
    """

    update: Tensor
    error: Tensor
    of: Tensor
    steps: int
    decay: float
    signs: Tensor = field(default_factory=lambda: torch.empty(0))
    there: Tensor = field(default_factory=lambda: torch.empty(0))

    def part(self, inputs: Tensor) -> _Seen:
        """Return it of some inputs."""
        return replace(
            self,
            update=self.update[:, inputs],
            error=self.error[:, inputs],
            there=self.there[:, inputs],
        )

    def residual(self, inputs: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return the update without that of factors, and its slopes in their logarithms.

        Parameters
        ----------
        inputs : Tensor, shape (N, C)
            Logarithms of features; minus infinity: 0.
        units : Tensor, shape (N, R)
            Of the slopes' sizes.

        Returns
        -------
        residual : Tensor, shape (R, C)
        slopes : Tensor, shape (N, R, C)
            Of the factors' update, in ``log |d_ni a_nj|``.
        """
        terms = self.signs[..., None] * (units[..., None] + inputs[:, None]).exp()
        gradient = terms.new_zeros(self.steps, *self.update.shape).index_add_(0, self.of, terms)
        update, slopes = adam_update(gradient, self.decay)
        return self.update - update, slopes[self.of] * terms


def adam_update(gradient: Tensor, decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the update that Adam makes of gradients, in units of lr, and its slopes.

    ``sum_k (1 - decay)^(K-1-k) (m_k / c1_k) / (sqrt(v_k / c2_k) + eps)``, from zero
    moments.

    Parameters
    ----------
    gradient : Tensor of float64, shape (K, ...)
    decay : float
        lr times AdamW's weight decay.

    Returns
    -------
    update : Tensor, shape (...)
        ``(1 - decay)^K w0 - w1``, over lr.
    slopes : Tensor, shape (K, ...)
        Of the update in each step's gradient.
    """
    count = len(gradient)
    m, v = torch.zeros_like(gradient[0]), torch.zeros_like(gradient[0])
    update, slopes = torch.zeros_like(m), torch.empty_like(gradient)
    tape: list[tuple[Tensor, Tensor]] = []
    for k, g in enumerate(gradient):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g.square()
        c1, c2, left = 1 - BETA1 ** (k + 1), 1 - BETA2 ** (k + 1), (1 - decay) ** (count - 1 - k)
        root = (v / c2).sqrt()
        along = left / (c1 * (root + EPS))
        update.addcmul_(m, along)
        # d root / d v = 1 / (2 c2 root)
        tape.append((along, m * along / ((root + EPS) * root.clamp_min(1e-30)) / (2 * c2)))
    dm, dv = torch.zeros_like(m), torch.zeros_like(m)
    for k in reversed(range(count)):
        along, across = tape[k]
        dm, dv = BETA1 * dm + along, BETA2 * dv - across
        slopes[k] = (1 - BETA1) * dm + 2 * (1 - BETA2) * gradient[k] * dv
    return update, slopes


@dataclass(frozen=True)
class _Fit:
    """Both factors by their logarithms: those that are there, and how well they are known."""

    inputs: Tensor
    units: Tensor
    spread: Tensor
    there: Tensor


def _fitted(seen: _Seen) -> _Fit:
    """Fit both factors: by sizes first, then more and more inputs by those that are known."""
    inputs, units, weight = _by_sizes(seen)
    if len(seen.of) > seen.steps:
        split, of_split = _split(seen, units)
        better = of_split > weight
        inputs, weight = torch.where(better, split, inputs), torch.where(better, of_split, weight)
    anchored = seen.there & (weight * _ANCHORED**2 > 1)
    # What sizes tell stands, whatever the residuals are.
    sized, weight = inputs, torch.where(anchored, weight, 0) + _WIDE**-2
    known, generator = anchored, torch.Generator().manual_seed(0)
    for turn in range(_ROUNDS):
        inputs, known, there = _peeled(seen, inputs, units, known)
        seen = replace(seen, there=there)
        inputs = torch.where(there, inputs, -torch.inf)
        prior = torch.where(anchored, sized, inputs), torch.where(there, weight, 0)
        new, spread, fits = _inputs_fitted(seen, inputs, units, prior, _WIDTHS[min(turn, 1)])
        inputs = torch.where(fits, new, inputs)
        if turn == _ROUNDS - 1 or (turn > 0 and bool((fits | ~there).all())):
            break
        least = torch.stack([row[of].median() for row, of in zip(inputs, there, strict=True)])
        # An input that a fit makes this small is none.
        gone = there & fits & (inputs < least[:, None] - _GONE)
        seen = replace(seen, there=there & ~gone)
        known |= fits & (spread < _ANCHORED)
        chosen = (fits | ~there).all(0).nonzero()[:, 0].cpu()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:_SAMPLE]]
        if len(chosen):
            units = _units_fitted(seen.part(chosen), inputs[:, chosen], units, _WIDTHS[1])
    # Of an input without any size, ratios between the steps are known alone.
    sure = fits & (anchored & there).any(0)
    return _Fit(inputs, units, torch.where(sure, spread, torch.inf), there)


def _by_sizes(seen: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logarithms of both factors by the gradients whose size is known.

    Their logarithms are a sum ``log |d_ni| + log a_nj``, which is fitted by least squares,
    in turns.

    Returns
    -------
    inputs, units : Tensor, shapes (N, C), (N, R)
        Where nothing is known a median unit, and a large input: it hides its size.
    weight : Tensor, shape (N, C)
        Inverse variance of the inputs' logarithms.
    """
    opened = seen.signs != 0
    alone = opened.double().T @ seen.there.double() == 1
    inputs, units = torch.zeros_like(seen.there, dtype=torch.float64), seen.signs.clone()
    weights = torch.zeros_like(inputs)
    for image, step in enumerate(seen.of.tolist()):
        rows, columns = opened[image], seen.there[image]
        size, spread, known = (
            part[rows][:, columns] for part in _sizes(seen, alone & rows[:, None] & columns, step)
        )
        off = (spread / size.clamp_min(1e-300)).square() + _FLOOR**2
        weight = torch.where(known, off.reciprocal(), 0)
        value = torch.where(known, size.clamp_min(1e-300).log(), 0)
        u, v, trusted = _summed(value, weight)
        inputs[image, columns] = _filled(u, trusted.sum(0) > 1, _LARGE)
        units[image, rows] = _filled(v, trusted.sum(1) > 1)
        weights[image, columns] = trusted.sum(0)
    return inputs, units, weights


def _summed(value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u (C,) and v (R,) of least squares ``v_i + u_j``, and the weights without strays."""
    u, v, trusted = torch.zeros_like(weight[0]), torch.zeros_like(weight[:, 0]), weight
    for turn in range(_FITS):
        v = (trusted * (value - u)).sum(1) / trusted.sum(1).clamp_min(1e-12)
        u = (trusted * (value - v[:, None])).sum(0) / trusted.sum(0).clamp_min(1e-12)
        # A coordinate that another step moved, too, has a size that is none.
        if turn >= _FITS // 2:
            off = (value - v[:, None] - u).square()
            trusted = weight / (1 + weight * off / _STRAYS**2)
    return u, v, trusted


def _split(seen: _Seen, units: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of several images a step by the gradients whose size is known.

    ``sum_n d_ni a_nj`` over a step's images, by non-negative least squares.

    Parameters
    ----------
    seen : _Seen
    units : Tensor, shape (N, R)
        Logarithms of the slopes' sizes.

    Returns
    -------
    inputs : Tensor, shape (N, C)
        Logarithms; minus infinity: 0.
    weight : Tensor, shape (N, C)
        Their inverse variance.
    """
    there, opened = seen.there.double(), (seen.signs != 0).double()
    moved = torch.stack(
        [opened[seen.of == k].T @ there[seen.of == k] > 0 for k in range(seen.steps)]
    )
    inputs, weights = torch.full_like(there, -torch.inf), torch.zeros_like(there)
    for step in range(seen.steps):
        images = seen.of == step
        size, spread, known = _sizes(seen, moved[step] & (moved.sum(0) == 1), step)
        value = size * seen.update.sign()
        floor = _FLOOR * size
        weight = torch.where(known, (spread.square() + floor.square()).reciprocal(), 0)
        slopes = seen.signs[images] * units[images].exp()
        normal = torch.einsum("ar,br,rc->cab", slopes, slopes, weight)
        right = torch.einsum("ar,rc->ca", slopes, weight * value)
        present = seen.there[images].T
        size_of = torch.diagonal(normal, dim1=1, dim2=2).clamp_min(1e-300)
        found = torch.zeros_like(right)
        for _ in range(_SWEEPS):
            for image in range(found.shape[1]):
                rest = right[:, image] - (normal[:, image] * found).sum(1)
                new = found[:, image] + rest / size_of[:, image]
                found[:, image] = torch.where(present[:, image], new.clamp_min(0), 0)
        scale = size_of.sqrt()
        correlated = normal / (scale[:, :, None] * scale[:, None, :])
        ridge = 1e-9 * torch.eye(found.shape[1]).to(normal)
        spread_of = torch.linalg.inv(correlated + ridge).diagonal(dim1=1, dim2=2).sqrt() / scale
        inputs[images] = found.log().T
        weights[images] = (found / spread_of).square().T
    return inputs, weights


def _filled(values: Tensor, known: Tensor, share: float = 0.5) -> Tensor:
    """Return values with a quantile of those that are known where they are not."""
    return torch.where(known, values, _quantile(values, known, share))


def _quantile(values: Tensor, known: Tensor, share: float) -> Tensor:
    """Return a quantile of the values that are known, 0 if none is, shape ()."""
    return values[known].quantile(share) if bool(known.any()) else values.new_zeros(())


def _peeled(
    seen: _Seen, inputs: Tensor, units: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs' logarithms, with those that follow from ones that are known.

    An image's feature is all that is not known of the coordinates in which other images are
    known, or absent. Each of them agrees with one value of it or a few: that which most agree
    with is taken, or 0. Then others follow, and so on.

    Parameters
    ----------
    seen : _Seen
    inputs, units : Tensor, shapes (N, C), (N, R)
        Logarithms.
    known : Tensor of bool, shape (N, C)

    Returns
    -------
    inputs : Tensor, shape (N, C)
    known : Tensor of bool, shape (N, C)
        More of them.
    there : Tensor of bool, shape (N, C)
        Fewer of them.
    """
    opened, there, known = (seen.signs != 0).double(), seen.there.clone(), known.clone()
    low, high, spacing = _TRIED
    # An input that is known in no image is guessed in one: ratios alone show.
    none = there.any(0) & ~(known & there).any(0)
    known[there.double().argmax(0)[none], none.nonzero()[:, 0]] = True
    middle = torch.stack([_filled(row, of).median() for row, of in zip(inputs, known, strict=True)])
    for _ in range(_PEELS):
        before = int((there & ~known).sum())
        for image in range(len(there)):
            wanted = there[image] & ~known[image]
            if not bool(wanted.any()):
                continue
            unknown = (there & ~known).double()
            unknown[image] = 0
            here = (opened.T @ unknown == 0) & (seen.signs[image] != 0)[:, None] & wanted
            here &= here.sum(0) >= _WITNESSES
            row, column = here.nonzero(as_tuple=True)
            if not len(row):
                continue
            tried = torch.arange(low, high, spacing).to(inputs) + middle[image]
            tried = torch.cat([tried.new_full((1,), -torch.inf), tried])
            agreed = _agreeing(seen, inputs, units, there & known, image, row, column, tried)
            most, best = agreed.max(1)
            sure = wanted & (most >= _WITNESSES / 2) & (most > _MOST * here.sum(0))
            value = tried[best]
            inputs[image] = torch.where(sure, value, inputs[image])
            there[image] &= ~(sure & (best == 0))
            known[image] |= sure
        if int((there & ~known).sum()) == before:
            break
    # Of an input that is known in no image, ratios alone show: it is large in one.
    above = torch.where(there & known, inputs - middle[:, None] - 1, -torch.inf).amax(0)
    return torch.where(none & there, inputs - above, inputs), known, there


def _agreeing(
    seen: _Seen,
    inputs: Tensor,
    units: Tensor,
    others: Tensor,
    image: int,
    row: Tensor,
    column: Tensor,
    tried: Tensor,
) -> Tensor:
    """Return how many coordinates agree with values of an image's features, shape (C, values).

    Parameters
    ----------
    seen : _Seen
    inputs, units : Tensor, shapes (N, C), (N, R)
        Logarithms.
    others : Tensor of bool, shape (N, C)
        Features that are known.
    image : int
    row, column : Tensor of int64, shape (n,)
        The coordinates.
    tried : Tensor
        Logarithms of features.
    """
    agreed = torch.zeros(seen.there.shape[1], len(tried)).to(inputs)
    spacing = float(tried[-1] - tried[-2])
    for chunk in torch.arange(len(row), device=row.device).split(_CHUNK * 32):
        i, j = row[chunk], column[chunk]
        terms = seen.signs[:, i] * (units[:, i] + inputs[:, j]).exp() * others[:, j]
        terms[image] = 0
        base = terms.new_zeros(seen.steps, len(i)).index_add_(0, seen.of, terms)
        own = seen.signs[image, i] * units[image, i].exp()
        wanted, error, step = seen.update[i, j], seen.error[i, j], seen.of[image]
        for number, value in enumerate(tried.tolist()):
            gradient = base.clone()
            gradient[step] += own * math.exp(value)
            update, slopes = adam_update(gradient, seen.decay)
            slope = (slopes[step] * own).abs() * math.exp(value) * spacing
            off = (wanted - update) / (_ALIKE + 5 * error + slope)
            agreed[:, number].index_add_(0, j, (-off.square()).exp())
    return agreed


def _inputs_fitted(
    seen: _Seen, inputs: Tensor, units: Tensor, prior: tuple[Tensor, Tensor], width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the inputs to the update, by Levenberg-Marquardt, each by itself.

    Coordinates whose residual is beyond `width` count less (Geman & McClure, 1987): a unit
    may have been taken for closed.

    Parameters
    ----------
    seen : _Seen
    inputs, units : Tensor, shapes (N, C), (N, R)
        Logarithms.
    prior : tuple of Tensor, shape (N, C) both
        What is known of the inputs' logarithms, and its inverse variance.
    width : float

    Returns
    -------
    inputs : Tensor, shape (N, C)
    spread : Tensor, shape (N, C)
        Standard deviation of the logarithms.
    fits : Tensor of bool, shape (N, C)
        Whether the input's coordinates fit in the units that the image opens.
    """
    parts = [
        _fitted_chunk(
            seen.part(chunk),
            inputs[:, chunk],
            units,
            (prior[0][:, chunk], prior[1][:, chunk]),
            width,
        )
        for chunk in torch.arange(inputs.shape[1], device=inputs.device).split(_CHUNK)
    ]
    found, spread, fits = zip(*parts, strict=True)
    return torch.cat(found, 1), torch.cat(spread, 1), torch.cat(fits, 1)


def _fitted_chunk(
    seen: _Seen, inputs: Tensor, units: Tensor, prior: tuple[Tensor, Tensor], width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `_inputs_fitted` of a few inputs."""
    middle, known = prior
    damping = torch.full_like(inputs[0], 1e-2)
    residual, slopes = seen.residual(inputs, units)
    away = torch.where(seen.there, middle - inputs, 0)
    for progress in _narrowing(width):
        scale = seen.error.square() + progress**2
        normal, right = _normal(residual, slopes, scale, "c")
        normal += torch.diag_embed(known.T + 1e-12)
        right += (known * away).T
        size = torch.diagonal(normal, dim1=1, dim2=2)
        damped = normal + torch.diag_embed(size * damping[:, None])
        moved = inputs + torch.linalg.solve(damped, right).clamp(-1, 1).T
        new, new_slopes = seen.residual(moved, units)
        apart = torch.where(seen.there, middle - moved, 0)
        before = (residual.square() / scale).log1p().sum(0) + (known * away.square()).sum(0)
        after = (new.square() / scale).log1p().sum(0) + (known * apart.square()).sum(0)
        taken = after < before
        damping = (damping * torch.where(taken, 1 / 3, 4.0)).clamp(1e-6, 1e3)
        inputs, away = torch.where(taken, moved, inputs), torch.where(taken, apart, away)
        residual = torch.where(taken, new, residual)
        slopes = torch.where(taken, new_slopes, slopes)
    spread = torch.linalg.inv(normal).diagonal(dim1=1, dim2=2).T.sqrt()
    opened = (seen.signs != 0).double()
    off = opened @ (residual.abs() > 5 * (seen.error + width)).double()
    return inputs, spread, off < _OUTLIERS * opened.sum(1, keepdim=True)


def _units_fitted(seen: _Seen, inputs: Tensor, units: Tensor, width: float) -> Tensor:
    """Return the logarithms of the slopes' sizes (N, R), fitted as inputs are."""
    closed = torch.diag_embed((seen.signs == 0).T.double())
    for _ in range(_ROWS):
        residual, slopes = seen.residual(inputs, units)
        scale = seen.error.square() + width**2
        normal, right = _normal(residual, slopes, scale, "r")
        size = torch.diagonal(normal, dim1=1, dim2=2)
        normal += torch.diag_embed(1e-3 * size + 1e-9) + closed
        units = units + torch.linalg.solve(normal, right).clamp(-0.3, 0.3).T
    return units


def _narrowing(width: float) -> Iterator[float]:
    """Yield the residuals from which coordinates count less, ten times `width` at first."""
    return (width * 10 ** max(0.0, 1 - n / (_STEPS - 3)) for n in range(_STEPS))


def _normal(residual: Tensor, slopes: Tensor, scale: Tensor, along: str) -> tuple[Tensor, Tensor]:
    """Return the normal equations of least squares, with weights by the residuals.

    Parameters
    ----------
    residual, scale : Tensor, shape (R, C)
    slopes : Tensor, shape (N, R, C)
    along : {"r", "c"}
        Whether there is a system for each unit or for each input.

    Returns
    -------
    normal : Tensor, shape (R or C, N, N)
    right : Tensor, shape (R or C, N)
    """
    weighted = slopes / (scale + residual.square())
    normal = torch.einsum(f"krc,lrc->{along}kl", weighted, slopes)
    return normal, torch.einsum(f"krc,rc->{along}k", weighted, residual)

"""The features of single images, by the update that Adam makes of their gradients.

In a step of one image a linear layer's gradient is ``d_k [a_k, 1]'``: the slopes of the
loss at the layer's output times its inputs. Adam makes of K such gradients one update,
coordinate by coordinate: what unit i and input j move depends on the K numbers
``d_ki a_kj`` alone. So the update holds far more numbers than the K pairs of factors that
it was made from, and these follow from it, whatever the labels are. Behind a ReLU most
factors are zero, and which are shows at once:

- a coordinate that did not move had no gradient in any step;
- one with a gradient in a single step moves by that step's own length, see
  `single_step_updates`, but for what Adam's epsilon takes off, by which the size of its
  gradient is known (see `adam.fingerprints`);
- one with gradients in two steps or more moves by a function of their ratios.

Sizes give a first pair of factors for each step, ratios what they leave open, and least
squares over all coordinates at once the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.adam.fingerprints import (
    inverted,
    single_step_terms,
    single_step_updates,
)
from server_strategies.attacks.matching.trajectory import BETA1, BETA2, EPS

_NEAR = 2e-3  # relative distance from a single step's length that epsilon may cause
_LEAST = 8  # inputs at a step's length, by which its unit counts as open at first
_TYPICAL = 0.2  # of the inputs that a step's units usually have at its length
_ZEROS = 3  # units that a step opens and an input leaves at rest, by which it is zero at first
_MIXED = 1 << 16  # kind of a coordinate that several steps moved
_RARELY, _NEVER = -3.0, -8.0  # logarithms of the probabilities of kinds that are not expected
_SURE = 1.0  # gain in logarithmic probability from which a unit or an input is flipped
_TURNS = 20
_FLOOR = 1e-2  # relative error of a size, at the least
_ANCHORED = 0.1  # relative error up to which a size, or a factor, is known
_SMALLEST = 20.0  # epsilons that a gradient is at least: smaller ones are mostly no single step's
_STRAYS = 3.0  # standard deviations from which a size counts less
_LARGE = 0.9  # quantile of an image's features that one of unknown size is taken for
_FITS = 60  # alternations of the fit to sizes
_RATIOS = (6.0, 0.05)  # range and spacing of the logarithms of ratios that are tried
_WIDTHS = (1e-3, 1e-4)  # residuals from which coordinates count less, first and last
_FITS_TO = 5e-4  # residual up to which a coordinate fits
_STEPS = 6  # least-squares steps for the inputs, a round
_ROWS = 3  # for the units
_SAMPLE = 1000  # inputs by which the units are fitted
_WIDE = 3.0  # standard deviation of a feature's logarithm, before anything is known
_CHUNK = 512  # inputs at a time, whose coordinates fit a CPU's cache
_PRECISE = 0.3  # relative error of a feature up to which it counts as known
_OUTLIERS = 0.1  # share of an input's coordinates that may not fit


@dataclass(frozen=True)
class StepFactors:
    """What goes into a linear layer, and the slopes at its output, by local step.

    Attributes
    ----------
    features : Tensor of float64, shape (K, in)
        Of the image of each step, scaled to length 1.
    spread : Tensor of float64, shape (K, in)
        Their standard deviation; infinite where they are hardly known, 0 where they are 0.
    slopes : Tensor of float64, shape (K, out)
        Of the loss at the layer's output, times the length of the features. A product of
        both is known, not which part of it is whose.
    """

    features: Tensor
    spread: Tensor
    slopes: Tensor


def step_factors(
    w0: tuple[Tensor, Tensor], w1: tuple[Tensor, Tensor], training: LocalTraining, num_steps: int
) -> StepFactors | None:
    """Return the factors of the gradients of a linear layer; None: they don't show.

    Parameters
    ----------
    w0, w1 : tuple of Tensor (out, in) and Tensor (out,)
        The layer's weight and bias before and after; its inputs are not negative.
    training : LocalTraining
        With Adam or AdamW and one image a step; Adam's weight decay changes every
        coordinate in every step, so that nothing shows.
    num_steps : int
        K.
    """
    if training.optimizer == "adam" and training.weight_decay:
        return None
    before, after = (torch.cat([w, b[:, None]], 1) for w, b in (w0, w1))
    decay = training.lr * training.weight_decay
    # The client multiplies by a factor of the weights' type, and rounds after every step.
    left, rested = torch.tensor(1 - decay).to(before), before
    for _ in range(num_steps):
        rested = rested * left
    update = (before.double() * left.double() ** num_steps - after) / training.lr
    unit = torch.finfo(before.dtype).eps / 2
    rounding = unit * before.double().abs() * num_steps**0.5 / training.lr
    update = torch.where((rested - after).abs() > rounding * training.lr, update, 0)
    lengths = single_step_updates(num_steps, decay).to(update)
    # Adam's own arithmetic adds an error of about five units.
    error = rounding + 5 * unit * lengths.max()
    signs, there = _open(update, lengths)
    if not bool(signs.any(1).all()) or not bool(there[:, :-1].any(1).all()):
        return None
    live, wide = signs.any(0), there.any(0)
    seen = _Seen(update[live][:, wide], error[live][:, wide], signs[:, live], there[:, wide], decay)
    inputs, units, spread = _fitted(seen)
    known = seen.there & (spread < _PRECISE)
    if not bool(known.any(1).all()):
        return None
    features, deviation = (update.new_zeros(num_steps, before.shape[1]) for _ in range(2))
    # Features of unknown size are large, but not larger than the others.
    most = [row[of].quantile(_LARGE) for row, of in zip(inputs, known, strict=True)]
    inputs = torch.where(known, inputs, torch.minimum(inputs, torch.stack(most)[:, None]))
    features[:, wide] = inputs.exp()
    features = features[:, :-1]
    deviation[:, wide] = torch.where(known, spread, torch.inf)
    deviation[:, wide] = torch.where(seen.there, deviation[:, wide], 0)
    slopes = update.new_zeros(num_steps, len(update))
    slopes[:, live] = seen.signs * units.exp()
    length = features.norm(dim=1, keepdim=True)
    features = features / length
    deviation = torch.where(features > 0, deviation[:, :-1] * features, 0)
    return StepFactors(features, deviation, slopes * length)


def _open(update: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return which units and inputs have gradients, by local step.

    Coordinates are of three kinds: at rest, at the length of a single step, or neither.
    Units and inputs are taken by what they make of these most probably, in turns.

    Parameters
    ----------
    update : Tensor, shape (out, in)
    lengths : Tensor, shape (K,)
        See `single_step_updates`.

    Returns
    -------
    signs : Tensor, shape (K, out)
        Of the slopes; 0: the step left the unit closed.
    there : Tensor of bool, shape (K, in)
        Which inputs the step's image had.
    """
    steps = torch.arange(1, len(lengths) + 1, device=update.device)
    apart = ((update.abs()[..., None] / lengths) - 1).abs()
    kind = torch.where(apart.amin(-1) < _NEAR, steps[apart.argmin(-1)], _MIXED)
    kind = torch.where(update == 0, 0, kind)
    counts = torch.stack([(kind == step).sum(1) for step in steps])
    typical = torch.stack([_filled(row.double(), row >= _LEAST) for row in counts])
    # By chance a few ratios of two steps have the length of a third, of a few inputs.
    units = (counts >= _LEAST) & (counts > _TYPICAL * typical.median(1, keepdim=True).values)
    inputs = (units.float() @ (kind == 0).float()) < _ZEROS
    for _ in range(_TURNS):
        before = units, inputs
        units = _flipped(kind, units, inputs)
        inputs = _flipped(kind.T, inputs, units)
        if all(map(torch.equal, before, (units, inputs))):
            break
    alone = units.float().T @ inputs.float() == 1
    signs = [
        torch.where(own, (update.sign() * (alone & there)).sum(1).sign(), 0)
        for own, there in zip(units, inputs, strict=True)
    ]
    return torch.stack(signs), inputs


def _flipped(kind: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows (K, R), each with the step flipped that makes its coordinates more probable.

    Parameters
    ----------
    kind : Tensor of int64, shape (R, C)
        0: at rest; k: at the length of step k, from 1; `_MIXED`: neither.
    rows, columns : Tensor of bool, shapes (K, R), (K, C)
        Which have a gradient in which step.
    """
    numbers = torch.arange(1, len(rows) + 1, device=kind.device)[:, None]
    # How many steps move a coordinate, and which, where it is one.
    count = rows.float().T @ columns.float()
    which = (rows * numbers).float().T @ columns.float()
    now = _log_probability(kind, count, which).sum(1)
    gains = []
    for step, (own, there) in enumerate(zip(rows, columns, strict=True), 1):
        change = torch.where(own, -1.0, 1.0)[:, None] * there
        then = _log_probability(kind, count + change, which + step * change)
        gains.append(then.sum(1) - now)
    gain, best = torch.stack(gains).max(0)
    return rows ^ ((gain > _SURE) & (numbers - 1 == best))


def _log_probability(kind: Tensor, count: Tensor, which: Tensor) -> Tensor:
    """Return the logarithms of kinds' probabilities, where `count` steps move coordinates."""
    at_rest, at_length = kind == 0, (kind > 0) & (kind < _MIXED)
    if_one = torch.where(kind == which, 0.0, torch.where(at_rest, _NEVER, _RARELY))
    if_more = torch.where(at_rest, _NEVER, torch.where(at_length, _RARELY, 0.0))
    return torch.where(
        count == 0, torch.where(at_rest, 0.0, _NEVER), torch.where(count == 1, if_one, if_more)
    )


@dataclass(frozen=True)
class _Seen:
    """A layer's update in units of lr: R units and C inputs that have gradients.

    Attributes
    ----------
    update, error : Tensor, shape (R, C)
    signs : Tensor, shape (K, R)
    there : Tensor of bool, shape (K, C)
    decay : float
        lr times AdamW's weight decay.
    """

    update: Tensor
    error: Tensor
    signs: Tensor
    there: Tensor
    decay: float

    def part(self, inputs: Tensor) -> _Seen:
        """Return it of some inputs."""
        return _Seen(
            self.update[:, inputs],
            self.error[:, inputs],
            self.signs,
            self.there[:, inputs],
            self.decay,
        )

    def residual(self, inputs: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Return the update without that of factors, and its slopes in their logarithms.

        Parameters
        ----------
        inputs : Tensor, shape (K, C)
            Logarithms of features; minus infinity: 0.
        units : Tensor, shape (K, R)
            Of the slopes' sizes.

        Returns
        -------
        residual : Tensor, shape (R, C)
        slopes : Tensor, shape (K, R, C)
            Of the factors' update, in ``log |d_ki a_kj|``.
        """
        gradient = self.signs[..., None] * (units[..., None] + inputs[:, None]).exp()
        update, slopes = adam_update(gradient, self.decay)
        return self.update - update, slopes.mul_(gradient)


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


def _fitted(seen: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logarithms of both factors, (K, C) and (K, R), and the inputs' spread."""
    sized, units, weight = _by_sizes(seen)
    anchored = seen.there & (weight * _ANCHORED**2 > 1)
    inputs = _by_ratios(seen, sized, units, anchored)
    inputs = torch.where(seen.there, inputs, -torch.inf)
    # What sizes tell stands, whatever the residuals are.
    prior = sized, torch.where(seen.there, weight + _WIDE**-2, 0)
    inputs, _, fits = _inputs_fitted(seen, inputs, units, prior, _WIDTHS[0])
    chosen = fits.nonzero()[:, 0].cpu()
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    chosen = chosen[order[:_SAMPLE]]
    units = _units_fitted(seen.part(chosen), inputs[:, chosen], units, _WIDTHS[1])
    inputs, spread, fits = _inputs_fitted(seen, inputs, units, prior, _WIDTHS[1])
    # Of an input without any size, ratios between the steps are known alone.
    known = fits & anchored.any(0)
    return inputs, units, torch.where(known, spread, torch.inf)


def _by_sizes(seen: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logarithms of both factors by the gradients whose size is known.

    Their logarithms are a sum ``log |d_ki| + log a_kj``, which is fitted by least squares,
    in turns.

    Returns
    -------
    inputs, units : Tensor, shapes (K, C), (K, R)
        Where nothing is known a median unit, and a large input: it hides its size.
    weight : Tensor, shape (K, C)
        Inverse variance of the inputs' logarithms.
    """
    steps = len(seen.signs)
    opened = seen.signs != 0
    alone = opened.double().T @ seen.there.double() == 1
    inputs, units = torch.zeros_like(seen.there, dtype=torch.float64), seen.signs.clone()
    weights = torch.zeros_like(inputs)
    for step in range(steps):
        own = alone & opened[step][:, None] & seen.there[step]
        a, b = (part.to(seen.update) for part in single_step_terms(step, steps, seen.decay))
        size, spread = inverted(seen.update[own].abs(), a, b, seen.error[own])
        # Near the limit those pass that errors make small.
        known = (size > _SMALLEST * EPS) & (spread < _ANCHORED * size)
        off = torch.where(known, spread / size.clamp_min(1e-30), torch.inf)
        weight, value = (torch.zeros_like(seen.update) for _ in range(2))
        weight[own] = (off.square() + _FLOOR**2).reciprocal()
        value[own] = torch.where(known, size.clamp_min(1e-30).log(), 0)
        u, trusted = torch.zeros_like(weight[0]), weight
        for turn in range(_FITS):
            v = (trusted * (value - u)).sum(1) / trusted.sum(1).clamp_min(1e-12)
            u = (trusted * (value - v[:, None])).sum(0) / trusted.sum(0).clamp_min(1e-12)
            # A coordinate that another step moved, too, has a size that is none.
            if turn >= _FITS // 2:
                off = (value - v[:, None] - u).square()
                trusted = weight / (1 + weight * off / _STRAYS**2)
        inputs[step] = _filled(u, trusted.sum(0) > 1, _LARGE)
        units[step] = _filled(v, trusted.sum(1) > 1)
        weights[step] = trusted.sum(0)
    return inputs, units, weights


def _filled(values: Tensor, known: Tensor, share: float = 0.5) -> Tensor:
    """Return values with a quantile of those that are known where they are not."""
    return torch.where(known, values, values[known].quantile(share) if bool(known.any()) else 0.0)


def _by_ratios(seen: _Seen, inputs: Tensor, units: Tensor, known: Tensor) -> Tensor:
    """Return the inputs' logarithms (K, C), with those that are not known, by ratios.

    Each coordinate with gradients in two steps agrees with one or a few ratios of the
    input's features in them. The ratio that most of the input's coordinates agree with is
    taken, from a step where the input is known to one where it is not.
    """
    steps = len(seen.signs)
    low, spacing = _RATIOS
    tried = torch.arange(-low, low + spacing / 2, spacing).to(seen.update)
    wanted = (seen.there & ~known).any(0)
    both = ((seen.signs != 0).double().T @ seen.there.double() == 2) & wanted
    best = torch.zeros(steps, steps, inputs.shape[1]).to(inputs)
    votes = torch.zeros_like(best)
    for first in range(steps):
        for second in range(first + 1, steps):
            pair = [first, second]
            here = both & (seen.signs[pair] != 0).all(0)[:, None] & seen.there[pair].all(0)
            row, column = here.nonzero(as_tuple=True)
            if not len(row):
                continue
            agreed = _agreeing(seen, units, pair, row, column, tried)
            most, at = agreed.max(1)
            best[first, second], best[second, first] = tried[at], -tried[at]
            votes[first, second] = votes[second, first] = most
    inputs, known, large = inputs.clone(), known.clone(), inputs
    none = ~known.any(0)
    known[seen.there.double().argmax(0)[none], none.nonzero()[:, 0]] = True
    for _ in range(steps):
        reach = votes * known[:, None] * (seen.there & ~known)
        most, start = reach.max(0)
        new = most > 0
        moved = inputs.gather(0, start) + best.gather(0, start[None])[0]
        inputs = torch.where(new, moved, inputs)
        known |= new
    # Of an input that is known in no step, ratios alone show: it is large in one.
    above = torch.where(seen.there, inputs - large, -torch.inf).amax(0)
    return torch.where(none, inputs - above, inputs)


def _agreeing(
    seen: _Seen, units: Tensor, pair: list[int], row: Tensor, column: Tensor, tried: Tensor
) -> Tensor:
    """Return how many coordinates of each input agree with a ratio, shape (C, ratios).

    Parameters
    ----------
    seen : _Seen
    units : Tensor, shape (K, R)
    pair : list of two int
        The local steps that the ratios are of.
    row, column : Tensor of int64, shape (n,)
        The coordinates, which have a gradient in these two steps alone.
    tried : Tensor
        Logarithms of ratios.
    """
    first, second = pair
    spacing = float(tried[1] - tried[0])
    widest = float(tried[-1]) + float((units[second] - units[first]).abs().max())
    grid = torch.arange(-widest - spacing, widest + 2 * spacing, spacing / 4).to(tried)
    curves = []
    for sign in (-1.0, 1.0):
        gradient = torch.zeros(len(seen.signs), len(grid)).to(tried)
        # Far above epsilon, where an update depends on ratios alone.
        gradient[first], gradient[second] = (-grid / 2).exp(), sign * (grid / 2).exp()
        curves.append(adam_update(gradient, seen.decay)[0])
    curve = torch.stack(curves)
    same = (seen.signs[first, row] * seen.signs[second, row] > 0).long()
    wanted = seen.update[row, column] * seen.signs[first, row]
    offset = units[second, row] - units[first, row]
    agreed = torch.zeros(seen.there.shape[1], len(tried)).to(tried)
    for chunk in torch.arange(len(row), device=row.device).split(20_000):
        place = (tried + offset[chunk, None] - grid[0]) / (grid[1] - grid[0])
        at = place.long()
        at_curve = curve[same[chunk]]
        below, above = at_curve.gather(1, at), at_curve.gather(1, at + 1)
        slope = (above - below).abs() * 4
        off = wanted[chunk, None] - torch.lerp(below, above, place - at)
        agreed.index_add_(0, column[chunk], (-(off / (_NEAR + slope)).square()).exp())
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
    inputs, units : Tensor, shapes (K, C), (K, R)
        Logarithms.
    prior : tuple of Tensor, shape (K, C) both
        What is known of the inputs' logarithms, and its inverse variance.
    width : float

    Returns
    -------
    inputs : Tensor, shape (K, C)
    spread : Tensor, shape (K, C)
        Standard deviation of the logarithms.
    fits : Tensor of bool, shape (C,)
        Whether the input's coordinates fit.
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
    return torch.cat(found, 1), torch.cat(spread, 1), torch.cat(fits)


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
    off = (residual.abs() > 5 * seen.error + _FITS_TO).double().mean(0)
    return inputs, spread, off < _OUTLIERS


def _units_fitted(seen: _Seen, inputs: Tensor, units: Tensor, width: float) -> Tensor:
    """Return the logarithms of the slopes' sizes (K, R), fitted as inputs are."""
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
    slopes : Tensor, shape (K, R, C)
    along : {"r", "c"}
        Whether there is a system for each unit or for each input.

    Returns
    -------
    normal : Tensor, shape (R or C, K, K)
    right : Tensor, shape (R or C, K)
    """
    weighted = slopes / (scale + residual.square())
    normal = torch.einsum(f"krc,lrc->{along}kl", weighted, slopes)
    return normal, torch.einsum(f"krc,rc->{along}k", weighted, residual)

"""The order of the local steps and the labels: the head's training, replayed.

The head's gradient in a step follows from its weights, the features of the step's images,
and their labels. So from w0 on all of the head's weights follow, step by step, once it is
known which images a step trained on. That is told by the slopes d_n that the update
holds: at the weights of image n's own step, and with its own label, the head gives
exactly these. At those of another step it gives others, as far as the weights have moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.low_rank.adam_steps import StepFactors
from server_strategies.attacks.matching.low_rank.head import Head, Weights
from server_strategies.attacks.matching.optimizers import Adam, Sgd

_WIDTH = 8  # orders that are followed at the same time
_LENGTHS = (-3.0, 8.0, 0.1)  # logarithms of a feature vector's length that are tried
_FINER = 10  # lengths tried between two of them
_BRANCHES = 3  # images beyond those of a step's best choice that may replace its worst


@dataclass(frozen=True)
class Replay:
    """A replay of the head's training.

    Attributes
    ----------
    order : tuple of int
        By place in the training, the term that was there; -1: of none that was found.
    labels : tuple of int
        By place.
    misfit : Tensor, shape (places,)
        By place, ``|d - d_n|^2 / |d_n|^2`` of its term's slopes; infinite without one.
    inwards : Tensor, shape (places, in)
        By place, the slopes of the step's loss in the features; 0 without a term.
    """

    order: tuple[int, ...]
    labels: tuple[int, ...]
    misfit: Tensor
    inwards: Tensor


@dataclass(frozen=True)
class _Term:
    """A term at some step: its number, its best label, how it fits, and its shortening."""

    number: int
    label: int
    misfit: float
    cost: float
    factor: float


@dataclass
class _Path:
    """An order up to some step."""

    weights: Weights
    momentum: list[Tensor]
    order: list[int]
    labels: list[int]
    misfits: list[float]
    inwards: list[Tensor]
    cost: float
    factor: float = 1.0  # by which the last step's gradient was shortened

    def of(self, training: LocalTraining) -> Sgd:
        """Return the optimiser as it is then."""
        optimizer = Sgd(training)
        optimizer.m = self.momentum
        return optimizer


def replay(
    head: Head,
    w0: Weights,
    features: Tensor,
    slopes: Tensor,
    noise: Tensor,
    sizes: Sequence[int],
    worth: Sequence[float],
    training: LocalTraining,
) -> Replay:
    """Find the order of terms and their labels by replaying the head's training.

    Parameters
    ----------
    head : Head
    w0 : dict of str to Tensor
        The head's weights before the training.
    features : Tensor, shape (m, in)
        Of the terms, each at its own step's weights.
    slopes : Tensor, shape (m, out)
        d_n of the terms, as the update holds them.
    noise : Tensor, shape (m,)
        Standard deviation of the noise in an entry of d_n.
    sizes : sequence of int
        By local step, the number of its images; together `places`, m or more.
    worth : sequence of float
        By local step, what a gradient is worth in the update, see `known_part`.
    training : LocalTraining
        With SGD.
    """
    missing, clipped = sum(sizes) - len(features), training.max_grad_norm > 0
    start = {name: w0[name].detach() for name in head.names}
    paths = [_Path(start, [], [], [], [], [], 0.0)]
    for size, share in zip(sizes, worth, strict=True):
        grown = [
            new
            for path in paths
            for new in _grown(head, path, features, slopes, noise, size, share, missing, clipped)
        ]
        grown.sort(key=lambda path: path.cost)
        paths = [_stepped(head, path, features, size, training) for path in grown[:_WIDTH]]
    best = paths[0]
    return Replay(
        tuple(best.order),
        tuple(best.labels),
        torch.tensor(best.misfits),
        torch.stack(best.inwards),
    )


def _grown(
    head: Head,
    path: _Path,
    features: Tensor,
    slopes: Tensor,
    noise: Tensor,
    size: int,
    share: float,
    missing: int,
    clipped: bool,
) -> list[_Path]:
    """Return a path's continuations by the images of one step, best first."""
    left = [n for n in range(len(features)) if n not in path.order]
    gone = path.order.count(-1)
    if not left:
        return [_extended(path, [], size)]
    given = head.slopes(path.weights, features[left])
    wanted = slopes[left] * (size / share)
    factor = torch.ones_like(given[..., 0])
    if clipped:  # each step's gradient was shortened, by an unknown factor
        along = (given * wanted[:, None]).sum(2)
        factor = (along / given.square().sum(2).clamp_min(1e-30)).clamp(0, 1)
    off = (factor[..., None] * given - wanted[:, None]).square().sum(2)
    scale = wanted.square().sum(1)
    least, label = (off / scale[:, None]).min(1)
    factor = factor.gather(1, label[:, None])[:, 0]
    # What noise alone does to the misfit is no sign of another step.
    floor = wanted.shape[1] * (noise[left] * size / share).square() / scale + 1e-9
    cost = (least / floor).log1p()
    ranked = cost.argsort().tolist()
    of = [
        _Term(left[n], int(label[n]), least[n].item(), cost[n].item(), factor[n].item())
        for n in ranked
    ]
    take = min(size, len(of))
    sets = [of[:take]]
    sets += [[*of[: take - 1], other] for other in of[take : take + _BRANCHES]]
    # A place may be that of an image that the update does not show.
    if missing > gone and take > 0:
        sets.append(of[: take - 1])
    return [_extended(path, chosen, size) for chosen in sets]


def _extended(path: _Path, chosen: list[_Term], size: int) -> _Path:
    """Return a path with a step's images, before its weights are stepped."""
    empty = size - len(chosen)
    return _Path(
        path.weights,
        path.momentum,
        path.order + [term.number for term in chosen] + [-1] * empty,
        path.labels + [term.label for term in chosen] + [-1] * empty,
        path.misfits + [term.misfit for term in chosen] + [torch.inf] * empty,
        path.inwards,
        # An image of which nothing is seen hardly moves the model, but it is no free choice.
        path.cost + sum(term.cost for term in chosen) + _EMPTY * empty,
        sum(term.factor for term in chosen) / max(len(chosen), 1),
    )


_EMPTY = 3.0  # cost of a place without a term, as that of a misfit twenty times the noise


def _stepped(
    head: Head, path: _Path, features: Tensor, size: int, training: LocalTraining
) -> _Path:
    """Return a path after the last step's update of the weights."""
    order, labels = path.order[-size:], path.labels[-size:]
    there = [place for place, n in enumerate(order) if n >= 0]
    inwards = features.new_zeros(size, features.shape[1])
    weights, momentum = path.weights, path.momentum
    if there:
        chosen = features[[order[place] for place in there]]
        targets = torch.tensor([labels[place] for place in there], device=features.device)
        gradient, back, _ = head.gradient(weights, chosen, targets)
        share = path.factor * len(there) / size  # the mean is over the whole step
        inwards[there] = back * share
        optimizer = path.of(training)
        stepped = optimizer.step(
            [weights[name] for name in head.names],
            [gradient[name] * share for name in head.names],
        )
        weights, momentum = dict(zip(head.names, stepped, strict=True)), optimizer.m
    return _Path(
        weights,
        momentum,
        path.order,
        path.labels,
        path.misfits,
        [*path.inwards, *inwards],
        path.cost,
    )


def update_scale(
    head: Head, w0: Weights, features: Tensor, slopes: Tensor, size: int, share: float
) -> float:
    """Return the factor by which an update was shortened, by the terms of its first step.

    At w0 they have the slopes of some class, but for that factor. The term that a class
    fits best is one of them.

    Parameters
    ----------
    head : Head
    w0 : dict of str to Tensor
    features : Tensor, shape (m, in)
    slopes : Tensor, shape (m, out)
        d_n as the update holds them.
    size : int
        Images of the first step.
    share : float
        What its gradient is worth in the update.
    """
    given = head.slopes({name: w0[name] for name in head.names}, features)
    wanted = slopes * (size / share)
    along = (given * wanted[:, None]).sum(2)
    squares = given.square().sum(2).clamp_min(1e-30)
    left = 1 - along.square() / (squares * wanted.square().sum(1, keepdim=True))
    left = torch.where(along > 0, left, torch.inf)
    best = int(left.argmin())
    return float((along / squares).flatten()[best])


def replay_steps(
    head: Head, w0: Weights, factors: StepFactors, training: LocalTraining, sizes: Sequence[int]
) -> tuple[Replay, Tensor]:
    """Find labels, and the length of the features, by replaying the head's training with Adam.

    Features and slopes of each image are known but for a factor that one has and the other
    lacks. At the length and with the label that are right the head gives exactly these slopes.

    Parameters
    ----------
    head : Head
    w0 : dict of str to Tensor
        The head's weights before the training.
    factors : StepFactors
    training : LocalTraining
        With Adam or AdamW.
    sizes : sequence of int
        Images by local step.

    Returns
    -------
    replay : Replay
    lengths : Tensor, shape (N,)
        Of the features.
    """
    weights = {name: w0[name].detach() for name in head.names}
    like = next(iter(weights.values()))
    features, slopes = (part.to(like) for part in (factors.features, factors.slopes))
    optimizer = Adam(training, smoothing=0.0)
    count = len(features)
    order, labels = [-1] * count, [-1] * count
    misfit, lengths = torch.full((count,), torch.inf), like.new_ones(count)
    inwards = torch.zeros_like(features)
    first = 0
    for size in sizes:
        here = [n for n in range(first, first + size) if bool(factors.found[n])]
        first += size
        factor = 1.0
        for n in here:
            image = _labelled(head, weights, features[n], slopes[n] * size, training)
            order[n], labels[n] = n, image.label
            misfit[n], lengths[n], factor = image.misfit, image.length, image.factor
        if not here:
            continue
        targets = torch.tensor([labels[n] for n in here], device=like.device)
        gradient, back, _ = head.gradient(weights, lengths[here, None] * features[here], targets)
        share = factor * len(here) / size  # the mean is over the whole step
        inwards[here] = share * back
        stepped = optimizer.step(
            [weights[name] for name in head.names],
            [share * gradient[name] for name in head.names],
        )
        weights = dict(zip(head.names, stepped, strict=True))
    return Replay(tuple(order), tuple(labels), misfit, inwards), lengths


@dataclass(frozen=True)
class _Labelled:
    """An image's label, the length of its features, the misfit, and the factor of clipping."""

    label: int
    length: float
    misfit: float
    factor: float


def _labelled(
    head: Head, weights: Weights, features: Tensor, slopes: Tensor, training: LocalTraining
) -> _Labelled:
    """Return the label and the length with which the head gives an image's slopes (out,)."""
    low, high, spacing = _LENGTHS
    tried = torch.arange(low, high, spacing).to(features)
    finer = torch.arange(-_FINER, _FINER + 1).to(features) * spacing / _FINER
    off, factor = _off(head, weights, features, slopes, tried.exp(), training)
    tried = tried[int(off.argmin()) // off.shape[1]] + finer
    off, factor = _off(head, weights, features, slopes, tried.exp(), training)
    at, label = divmod(int(off.argmin()), off.shape[1])
    return _Labelled(label, tried[at].exp().item(), off[at, label].item(), factor[at, label].item())


def _off(
    head: Head,
    weights: Weights,
    features: Tensor,
    slopes: Tensor,
    lengths: Tensor,
    training: LocalTraining,
) -> tuple[Tensor, Tensor]:
    """Return the misfit of a step's slopes by length and label, and the factor of clipping.

    Both of shape (lengths, num_classes).
    """
    given = head.slopes(weights, lengths[:, None] * features)
    wanted = slopes / lengths[:, None]
    factor = torch.ones_like(given[..., 0])
    if training.max_grad_norm:
        along = (given * wanted[:, None]).sum(2)
        factor = (along / given.square().sum(2).clamp_min(1e-30)).clamp(0, 1)
    off = (factor[..., None] * given - wanted[:, None]).square().sum(2)
    return off / wanted.square().sum(1)[:, None], factor

"""Fingerprints: gradients of single local steps that Adam's epsilon gives away.

Adam moves a coordinate that has a gradient in one of its K steps alone by a distance
that tells which step it was, and hardly depends on the gradient. Little is enough:
float32 keeps what eps does to the move, so the gradient follows in closed form,
however many steps came before and after. Whole rows of a weight are such
coordinates: those of a hidden unit that only images of one batch activate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.trajectory import BETA1, BETA2, EPS

_NEAR = 2e-3  # how near a move is to that of a large gradient, relatively
_SHARE = 0.6  # of a row's coordinates that moved, which are to be that near
_MOST = 64  # rows kept of a weight and a step
_FINEST = 1e-5  # misfit of a row below which its coordinates are weighed no further


@dataclass(frozen=True)
class Fingerprint:
    """The gradient of some rows of a weight in one local step.

    Attributes
    ----------
    step : int
        The local step, from 0.
    name : str
        The weight's.
    rows : Tensor of int64, shape (R,)
        Along the weight's first dimension: the units.
    gradient : Tensor, shape (R, D)
        0 where it is not known.
    spread : Tensor, shape (R, D)
        Standard deviation of what rounding makes of the gradient: it grows with the
        gradient's square. Infinite where it is not known.
    weight : Tensor, shape (R, D)
        How much a coordinate counts where rows are explained, in [0, 1].
    """

    step: int
    name: str
    rows: Tensor
    gradient: Tensor
    spread: Tensor
    weight: Tensor

    @property
    def known(self) -> Tensor:
        """Where float32 keeps the gradient's size, shape (R, D) of bool."""
        return self.spread.isfinite()

    def weighed(self, misfit: Tensor) -> Fingerprint:
        """Return it with weights that suit how well its rows are explained so far.

        ``1 / sqrt(1 + spread^2 / (misfit rms^2))``, with the rms of a row's gradient where
        there is one: what rounding spoils counts less, the more so the better the rest
        is explained; as long as nothing is, all that is known counts alike.

        Parameters
        ----------
        misfit : Tensor, shape (R,)
            Share of a row's square that is not explained, in [0, 1].
        """
        square = self.gradient.square().sum(1) / (self.gradient != 0).sum(1).clamp(min=1)
        left = (misfit.clamp(min=_FINEST) * square)[:, None] + torch.finfo(square.dtype).tiny
        return replace(self, weight=(1 + self.spread.square() / left).rsqrt())


def single_touch(step: int, num_steps: int, decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return how Adam moves a coordinate that has a gradient g in one of K steps only.

    It moves by ``lr sum_k a_k |g| / (b_k |g| + eps)`` over the steps k from `step`
    on, with the bias-corrected moments ``a_k = (1 - b1) b1^(k-step) / (1 - b1^(k+1))``
    and b_k the root of the same with b2.

    Parameters
    ----------
    step : int
        From 0.
    num_steps : int
        K.
    decay : float
        lr times AdamW's weight decay, which shrinks the earlier of these moves; it
        is part of a_k.

    Returns
    -------
    a, b : Tensor of float64, shape (K - step,)
        ``(a / b).sum()`` is the move in units of lr for ``|g| >> eps``.
    """
    k = torch.arange(step, num_steps, dtype=torch.float64)
    a = (1 - BETA1) * BETA1 ** (k - step) / (1 - BETA1 ** (k + 1))
    b = ((1 - BETA2) * BETA2 ** (k - step) / (1 - BETA2 ** (k + 1))).sqrt()
    return a * (1 - decay) ** (num_steps - 1 - k), b


def single_touch_moves(num_steps: int, decay: float = 0.0) -> Tensor:
    """Return by step how far, in units of lr, that step alone moves a coordinate, shape (K,).

    For ``|g| >> eps``, see `single_touch`; the later the step, the shorter.

    Parameters
    ----------
    num_steps : int
        K.
    decay : float
        lr times AdamW's weight decay.
    """
    touches = (single_touch(step, num_steps, decay) for step in range(num_steps))
    return torch.stack([(a / b).sum() for a, b in touches])


def find_fingerprints(
    w0: Mapping[str, Tensor], w1: Mapping[str, Tensor], training: LocalTraining, num_steps: int
) -> list[Fingerprint]:
    """Find the rows of weights that a single step of Adam touched, and their gradients.

    A row counts where most of its coordinates that moved did so by what one and
    the same step makes of a large gradient. Noise, rounding and clipping of the
    update leave none.

    Parameters
    ----------
    w0, w1 : mapping of str to Tensor
        The weights before and after; those of two dimensions are looked at.
    training : LocalTraining
    num_steps : int
        K.

    Returns
    -------
    list of Fingerprint
        By weight and step; of many rows those with the most zeros, which the
        fewest images activate. None for SGD, whose moves do not tell the step, and
        for Adam with weight decay, which touches every weight in every step.
    """
    if training.optimizer == "sgd" or (training.optimizer == "adam" and training.weight_decay):
        return []
    decay = training.lr * training.weight_decay
    limits = single_touch_moves(num_steps, decay).flip(0)  # ascending
    found = []
    for name, before in w0.items():
        if before.dim() != 2:
            continue
        # In units of lr, in float64, which adds no rounding to that of the weights.
        moves = (before.double() * (1 - decay) ** num_steps - w1[name].double()) / training.lr
        # Each step stores a weight to half a unit in its last place.
        unit = torch.finfo(before.dtype).eps / 2
        rounding = unit * before.abs().double() * num_steps**0.5 / training.lr
        moves = torch.where(moves.abs() > rounding, moves, 0)
        limits = limits.to(moves.device)
        nearest = torch.bucketize(moves.abs(), (limits[1:] + limits[:-1]) / 2)
        near = (moves.abs() / limits[nearest] - 1).abs() < _NEAR
        places = nearest + num_steps * torch.arange(len(moves), device=moves.device)[:, None]
        counts = torch.bincount(places[near], minlength=num_steps * len(moves))
        share = counts.view(len(moves), num_steps) / (moves != 0).sum(1, keepdim=True).clamp(min=1)
        for step in range(num_steps):
            rows = (share[:, num_steps - 1 - step] > _SHARE).nonzero()[:, 0]
            if not len(rows):
                continue
            sparsest = (moves[rows] == 0).sum(1).argsort(descending=True, stable=True)
            rows = rows[sparsest[:_MOST]]
            a, b = single_touch(step, num_steps, decay)
            # Adam's own arithmetic adds about five such units of the move.
            error = rounding[rows] + 5 * unit * limits[num_steps - 1 - step]
            size, spread = _invert(moves[rows].abs(), a.to(moves), b.to(moves), error)
            gradient = (size * moves[rows].sign()).to(before.dtype)
            weight = spread.isfinite().to(before.dtype)
            found.append(Fingerprint(step, name, rows, gradient, spread.to(before.dtype), weight))
    return found


def _invert(moves: Tensor, a: Tensor, b: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return |g| of moves in units of lr, 0 where it is not known, and its spread."""
    # z = eps / |g| solves sum_k a_k / (b_k + z) = move. The left side falls and is
    # convex in z, so that Newton's method climbs to it from 0.
    z = torch.zeros_like(moves)
    for _ in range(20):
        terms = a / (b + z[..., None])
        slope = (terms / (b + z[..., None])).sum(-1)
        z = (z + (terms.sum(-1) - moves) / slope).clamp(min=0)
    known = ((a / b).sum() - moves > 3 * error) | (moves == 0)
    size = torch.where(known & (moves > 0), EPS / z, 0)
    # A move falls by `slope` a z, and d|g| = |g|^2 / eps dz.
    slope = (a / (b + z[..., None]).square()).sum(-1)
    return size, torch.where(known, size.square() * error / (EPS * slope), torch.inf)

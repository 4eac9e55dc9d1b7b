"""Fingerprints: rows of a single local step's gradient that Adam's epsilon reveals.

A coordinate may have a gradient in only one of K steps. The size of its update then
identifies the step and hardly depends on the gradient: a fingerprint of the step. The
small dependence is due to Adam's epsilon, and float32 keeps it. So the gradient follows
in closed form, however many steps came before and after. Whole rows of a weight
consist of such coordinates: those of a hidden unit that only images of one batch
activate. Such a single-step gradient row is called a fingerprint here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.optimizers import BETA1, BETA2, EPS

_NEAR = 2e-3  # relative tolerance of a coordinate update around that of a large gradient
_SHARE = 0.6  # of a row's changed coordinates, which have to be within that tolerance
_MOST = 64  # rows kept of a weight and a step
_FINEST = 1e-5  # misfit of a row below which its weights no longer change


@dataclass(frozen=True)
class Fingerprint:
    """Rows of the gradient of one weight in one local step: single-step gradient rows.

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
        Standard deviation of the gradient's rounding error, which grows with the
        gradient's square. Infinite where the gradient is not known.
    weight : Tensor, shape (R, D)
        How much a coordinate counts when rows are fitted, in [0, 1].
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

    def weighted(self, misfit: Tensor) -> Fingerprint:
        """Return it with weights that suit how well its rows are fitted so far.

        ``1 / sqrt(1 + spread^2 / (misfit rms^2))``, with the rms of a row's nonzero
        gradients. Coordinates with rounding errors count less, the more so the better
        the row is fitted. While nothing is fitted, all known coordinates count alike.

        Parameters
        ----------
        misfit : Tensor, shape (R,)
            Share of a row's square that is not fitted, in [0, 1].
        """
        square = self.gradient.square().sum(1) / (self.gradient != 0).sum(1).clamp(min=1)
        left = (misfit.clamp(min=_FINEST) * square)[:, None] + torch.finfo(square.dtype).tiny
        return replace(self, weight=(1 + self.spread.square() / left).rsqrt())


def single_step_terms(step: int, num_steps: int, decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the terms of Adam's update where only one of K steps has a gradient g.

    The update's size is ``lr sum_k a_k |g| / (b_k |g| + eps)`` over the steps k from
    `step` on, with the bias-corrected moments
    ``a_k = (1 - b1) b1^(k-step) / (1 - b1^(k+1))`` and b_k the root of the same with b2.

    Parameters
    ----------
    step : int
        From 0.
    num_steps : int
        K.
    decay : float
        lr times AdamW's weight decay, which shrinks the earlier of these terms; it
        is part of a_k.

    Returns
    -------
    a, b : Tensor of float64, shape (K - step,)
        ``(a / b).sum()`` is the update in units of lr for ``|g| >> eps``.
    """
    k = torch.arange(step, num_steps, dtype=torch.float64)
    a = (1 - BETA1) * BETA1 ** (k - step) / (1 - BETA1 ** (k + 1))
    b = ((1 - BETA2) * BETA2 ** (k - step) / (1 - BETA2 ** (k + 1))).sqrt()
    return a * (1 - decay) ** (num_steps - 1 - k), b


def single_step_updates(num_steps: int, decay: float = 0.0) -> Tensor:
    """Return Adam's coordinate update if step k alone has a gradient, by k, shape (K,).

    In units of lr, for ``|g| >> eps``, see `single_step_terms`. Later steps have
    smaller updates.

    Parameters
    ----------
    num_steps : int
        K.
    decay : float
        lr times AdamW's weight decay.
    """
    terms = (single_step_terms(step, num_steps, decay) for step in range(num_steps))
    return torch.stack([(a / b).sum() for a, b in terms])


def find_fingerprints(
    w0: Mapping[str, Tensor], w1: Mapping[str, Tensor], training: LocalTraining, num_steps: int
) -> list[Fingerprint]:
    """Find the rows of weights that a single step of Adam changed, and their gradients.

    A row counts if most of its changed coordinates have the update that one and the
    same step gives to a large gradient. Noise, rounding and clipping of the update
    leave no such rows.

    Parameters
    ----------
    w0, w1 : mapping of str to Tensor
        The weights before and after; only those of two dimensions are searched.
    training : LocalTraining
    num_steps : int
        K.

    Returns
    -------
    list of Fingerprint
        By weight and step. Of many rows those with the most zeros are kept, which
        the fewest images activate. Empty for SGD, whose updates do not identify the
        step, and for Adam with weight decay, which changes every weight in every step.
    """
    decay = training.lr * training.weight_decay
    limits = single_step_updates(num_steps, decay)
    found = []
    for name, before in w0.items():
        if before.dim() != 2:
            continue
        updates, rounding, of_step = single_step_rows(before, w1[name], training, num_steps)
        unit = torch.finfo(before.dtype).eps / 2
        for step in range(num_steps):
            rows = (of_step == step).nonzero()[:, 0]
            if not len(rows):
                continue
            sparsest = (updates[rows] == 0).sum(1).argsort(descending=True, stable=True)
            rows = rows[sparsest[:_MOST]]
            a, b = single_step_terms(step, num_steps, decay)
            # Adam's own arithmetic adds an error of about five such units.
            error = rounding[rows] + 5 * unit * float(limits[step])
            size, spread = inverted(updates[rows].abs(), a.to(updates), b.to(updates), error)
            gradient = (size * updates[rows].sign()).to(before.dtype)
            weight = spread.isfinite().to(before.dtype)
            found.append(Fingerprint(step, name, rows, gradient, spread.to(before.dtype), weight))
    return found


def single_step_rows(
    before: Tensor, after: Tensor, training: LocalTraining, num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the updates of a weight's rows, and which local step alone changed each row.

    Parameters
    ----------
    before, after : Tensor, shape (R, D)
    training : LocalTraining
    num_steps : int
        K.

    Returns
    -------
    updates : Tensor of float64, shape (R, D)
        ``before - after`` in units of lr, of the sign of the gradient; 0 within rounding.
    rounding : Tensor of float64, shape (R, D)
        How far the weights' rounding may have moved them.
    step : Tensor of int64, shape (R,)
        -1 where several steps changed a row, or none did. So everywhere for SGD, for
        Adam with weight decay, and where Adam's steps are no plain ones.
    """
    decay = training.lr * training.weight_decay
    # In units of lr, and in float64, so that only the weights' rounding remains.
    updates = (before.double() * (1 - decay) ** num_steps - after.double()) / training.lr
    # Each step stores a weight to half a unit in its last place.
    unit = torch.finfo(before.dtype).eps / 2
    rounding = unit * before.abs().double() * num_steps**0.5 / training.lr
    updates = torch.where(updates.abs() > rounding, updates, 0)
    none = torch.full((len(before),), -1, device=before.device)
    beyond = training.beyond("loss", "label_smoothing", "class_weights", "drop_last", "trainable")
    decayed = training.optimizer == "adam" and training.weight_decay
    if training.optimizer == "sgd" or decayed or beyond:
        return updates, rounding, none
    limits = single_step_updates(num_steps, decay).flip(0)  # ascending
    most, place = _shares(updates, limits.to(updates.device)).max(1)
    return updates, rounding, torch.where(most > _SHARE, num_steps - 1 - place, none)


def _shares(updates: Tensor, limits: Tensor) -> Tensor:
    """Return the share of each row's changed coordinates by the limit they are at, (rows, K)."""
    nearest = torch.bucketize(updates.abs(), (limits[1:] + limits[:-1]) / 2)
    near = (updates.abs() / limits[nearest] - 1).abs() < _NEAR
    num_rows, num_steps = len(updates), len(limits)
    places = nearest + num_steps * torch.arange(num_rows, device=updates.device)[:, None]
    counts = torch.bincount(places[near], minlength=num_steps * num_rows)
    return counts.view(num_rows, num_steps) / (updates != 0).sum(1, keepdim=True).clamp(min=1)


def inverted(sizes: Tensor, a: Tensor, b: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return |g| by the size of its update in units of lr, 0 where not known, and its spread."""
    # z = eps / |g| solves sum_k a_k / (b_k + z) = size. The left side is decreasing and
    # convex in z, so that Newton's method converges to the solution from 0.
    z = torch.zeros_like(sizes)
    for _ in range(20):
        terms = a / (b + z[..., None])
        slope = (terms / (b + z[..., None])).sum(-1)
        z = (z + (terms.sum(-1) - sizes) / slope).clamp(min=0)
    known = ((a / b).sum() - sizes > 3 * error) | (sizes == 0)
    magnitude = torch.where(known & (sizes > 0), EPS / z, 0)
    # d size / dz = -slope, and d|g| = |g|^2 / eps dz.
    slope = (a / (b + z[..., None]).square()).sum(-1)
    return magnitude, torch.where(known, magnitude.square() * error / (EPS * slope), torch.inf)

"""Which units the images of a client open, and which inputs they have, by Adam's update.

A coordinate of a linear layer's update is at rest where no step has a gradient, at a
step's own length where that step alone has one, and of another length where several do.
So what kinds the coordinates are tells which image has which input, and opens which unit.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

_NEAR = 2e-3  # relative distance from a single step's length that epsilon may cause
_ZEROS = 3  # units that a step opens and an input leaves at rest, by which it is zero at first
_MIXED = 1 << 16  # kind of a coordinate that several steps moved
_RARELY, _NEVER = -3.0, -8.0  # logarithms of the probabilities of kinds that are not expected
_SURE = 1.0  # gain in logarithmic probability from which a unit or an input is flipped
_TURNS = 20


def kinds(update: Tensor, lengths: Tensor) -> Tensor:
    """Return the kind of each coordinate, shape (R, C) of int64.

    0: at rest; k: at the length of step k, from 1; more than K: neither.

    Parameters
    ----------
    update : Tensor, shape (R, C)
        In units of lr.
    lengths : Tensor, shape (K,)
        See `single_step_updates`.
    """
    steps = torch.arange(1, len(lengths) + 1, device=update.device)
    apart = ((update.abs()[..., None] / lengths) - 1).abs()
    kind = torch.where(apart.amin(-1) < _NEAR, steps[apart.argmin(-1)], _MIXED)
    return torch.where(update == 0, 0, kind)


def opened_and_there(
    update: Tensor, kind: Tensor, units: Tensor, of: Tensor, until: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Return which units and inputs have gradients, by image.

    Coordinates are of three kinds: at rest, at the length of a single step, or neither.
    Units and inputs are taken by what they make of these most probably, in turns.

    Parameters
    ----------
    update : Tensor, shape (R, C)
    kind : Tensor of int64, shape (R, C)
        See `kinds`.
    units : Tensor of bool, shape (N, R)
        To begin with.
    of : Tensor of int64, shape (N,)
        The images' local steps.
    until : float
        By `time.monotonic`, after which no more turn is made.

    Returns
    -------
    signs : Tensor, shape (N, R)
        Of the slopes; 0: the image leaves the unit closed.
    there : Tensor of bool, shape (N, C)
        Which inputs the image has.
    """
    inputs = (units.float() @ (kind == 0).float()) < _ZEROS
    inputs &= units.any(1)[:, None]
    # Units that were told apart by their products stay.
    sure = units if len(of) > int(of.max()) + 1 else torch.zeros_like(units)
    for turn in range(_TURNS):
        if turn and time.monotonic() > until:
            break
        before = units, inputs
        units = _flipped(kind, units, inputs, of) | sure
        inputs = _flipped(kind.T, inputs, units, of)
        if all(map(torch.equal, before, (units, inputs))):
            break
    alone = units.float().T @ inputs.float() == 1
    signs = [
        torch.where(own, (update.sign() * (alone & there)).sum(1).sign(), 0)
        for own, there in zip(units, inputs, strict=True)
    ]
    return torch.stack(signs), inputs


def _flipped(kind: Tensor, rows: Tensor, columns: Tensor, of: Tensor) -> Tensor:
    """Return rows (N, R), each with the image flipped that makes its coordinates more probable.

    Parameters
    ----------
    kind : Tensor of int64, shape (R, C)
        See `kinds`.
    rows, columns : Tensor of bool, shapes (N, R), (N, C)
        Which have a gradient by which image.
    of : Tensor of int64, shape (N,)
        The images' local steps.
    """
    moved = torch.stack(
        [
            rows[of == step].float().T @ columns[of == step].float()
            for step in range(int(of.max()) + 1)
        ]
    )
    numbers = torch.arange(1, len(moved) + 1, device=kind.device).view(-1, 1, 1)
    # How many steps move a coordinate, and which, where it is one.
    count, which = (moved > 0).sum(0), ((moved > 0) * numbers).sum(0)
    gain = torch.zeros(rows.shape, device=kind.device)
    for step, images in enumerate(moved):
        own = (images > 0).long()
        others, another = count - own, which - (step + 1) * own
        # What it tells for the step, that it moves a coordinate or not.
        more = _log_probability(kind, others + 1, another + step + 1)
        more -= _log_probability(kind, others, another)
        first, last = more * (images == 0), more * (images == 1)
        for image in (of == step).nonzero()[:, 0].tolist():
            there = columns[image].float()
            gain[image] = torch.where(rows[image], -(last @ there), first @ there)
    most, best = gain.max(0)
    every = torch.arange(len(rows), device=kind.device)[:, None]
    return rows ^ ((most > _SURE) & (every == best))


def _log_probability(kind: Tensor, count: Tensor, which: Tensor) -> Tensor:
    """Return the logarithms of kinds' probabilities, where `count` steps move coordinates."""
    at_rest, at_length = kind == 0, (kind > 0) & (kind < _MIXED)
    if_one = torch.where(kind == which, 0.0, torch.where(at_rest, _NEVER, _RARELY))
    if_more = torch.where(at_rest, _NEVER, torch.where(at_length, _RARELY, 0.0))
    return torch.where(
        count == 0, torch.where(at_rest, 0.0, _NEVER), torch.where(count == 1, if_one, if_more)
    )

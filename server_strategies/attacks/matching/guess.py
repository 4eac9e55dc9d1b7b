"""Guessing how a client trained, from its update alone, where the protocol does not tell."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d, median_filter
from torch import Tensor

from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.matching.adam.fingerprints import single_touch_moves

SIGN_LIKE = 0.3  # `spread` above which steps are nearly signs: Adam's, not SGD's
_BIN = 1e-3  # of log |u|; spikes are narrower
_MAX_STEPS = 100  # of Adam, whose spikes are told apart


@dataclass(frozen=True)
class Guess:
    """A guessed local training.

    Attributes
    ----------
    training : LocalTraining
        Without momentum, weight decay and clipping, which are not guessed. BatchNorm
        is in training mode where its running statistics changed, or has none.
    reason : str
        What the guess rests on, and what can't be told apart.
    confident : bool
        Whether the learning rate and K are expected within 10%.
    """

    training: LocalTraining
    reason: str
    confident: bool


def guess_training(observation: Observation, batch_size: int | None = None) -> Guess:
    """Guess a client's optimiser, learning rate and number of local steps.

    The optimiser shows in the spread of ``|u| = |w0 - w1|``: Adam moves most
    coordinates by about its rate (measured on clients of this project, 73 to
    100% of those that moved lie within a factor 10 of the largest), SGD by its
    rate times a heavy-tailed gradient (at most 2%).

    One pass over the client's N images is assumed, so K is N / B rounded up.

    Parameters
    ----------
    observation : Observation
    batch_size : int, optional
        B, where it is known.

    Raises
    ------
    ValueError
        If the update is zero, `batch_size` is below 1, or the client seems to
        use SGD and the model's classifier has no bias, which gives its rate away.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 or more, or None (unknown)")
    update = {name: move.detach() for name, move in observation.update.items()}
    size = torch.cat([u.flatten().abs() for u in update.values()])
    size = size[size > 0]
    if not len(size):
        raise ValueError("the update is zero: the client returned what it was sent")
    guess = (
        _guess_adam(size, observation.num_examples, batch_size)
        if spread(size) > SIGN_LIKE
        else _guess_sgd(update, observation.num_examples, batch_size)
    )
    means = [name for name in observation.w0 if name.endswith("running_mean")]
    if not means or any(not torch.equal(observation.w0[n], observation.w1[n]) for n in means):
        return guess
    return replace(
        guess,
        training=replace(guess.training, batch_norm="eval"),
        reason=f"{guess.reason}; BatchNorm in evaluation mode, or its statistics were kept back",
    )


def spread(size: Tensor) -> float:
    """Return the share of coordinates, of those that moved, within 10 times of the largest.

    Parameters
    ----------
    size : Tensor
        |u| by coordinate, not all zero.
    """
    moved = size[size > 0]
    return (moved > moved.max() / 10).float().mean().item()


def _guess_adam(size: Tensor, num_examples: int, batch_size: int | None) -> Guess:
    """Guess the rate and K of Adam from the sizes of the moves, shape (moved,), above 0."""
    sizes = [batch_size] if batch_size else range(1, num_examples + 1)
    allowed = sorted({math.ceil(num_examples / b) for b in sizes})
    told = "adam by the narrow spread of its moves (adamw looks the same)"
    top = size.max().item()
    found = _fit_spikes(np.log(size.double().cpu().numpy() / top), allowed)
    if found:
        lr, steps = top * found[0], found[1]
        # Rates are round numbers; the inversion of Adam needs it exact.
        lr = float(f"{lr:.2g}") if abs(float(f"{lr:.2g}") / lr - 1) < 5e-3 else lr
        told += f"; lr and K={steps} by the coordinates that one step alone touched"
    else:
        # A gradient of constant sign moves by lr a step. torch's default rate decides between Ks.
        steps = min(allowed, key=lambda k: abs(math.log(top / k / 1e-3)))
        lr = top / steps
        given = "the batch size" if batch_size else "torch's default rate of 1e-3"
        told += f"; lr from the longest move of lr K, with K={steps} by {given}"
    images = batch_size or math.ceil(num_examples / steps)
    training = LocalTraining("adam", lr=lr, batch_size=images, local_steps=steps)
    return Guess(training, told, confident=found is not None)


def _fit_spikes(sizes: NDArray[np.float64], allowed: list[int]) -> tuple[float, int] | None:
    """Fit Adam's rate and K to the spikes in the distribution of its moves.

    A coordinate that a single step touched (a unit that only one batch
    activates) moves by exactly ``lr single_touch_moves(K)[j]``, so that the histogram
    has K spikes whose distances depend on K alone. The fit is the share of all
    spikes' mass at the expected places, times the share of places with a spike.

    Parameters
    ----------
    sizes : array, shape (moved,)
        log of |u| over the largest.
    allowed : list of int
        Values of K to try.

    Returns
    -------
    tuple of (float, int) or None
        The rate in units of the largest |u|, and K; None: there are no spikes.
    """
    low, high = -5.0, 1.0
    counts = np.histogram(sizes, bins=round((high - low) / _BIN), range=(low, high))[0]
    around = median_filter(counts, 51)
    spikes = np.maximum(counts - around - 5 * np.sqrt(around + 1), 0)
    if spikes.sum() < 0.01 * len(sizes):
        return None
    near = maximum_filter1d(spikes, 3)
    best, found = 0.3, None  # the true K fits by 0.39 and more, measured, and better than others
    for steps in (k for k in allowed if k <= _MAX_STEPS):
        places = np.unique(np.round(np.log(single_touch_moves(steps).numpy()) / _BIN).astype(int))
        # The longest move is at most lr K, and hardly less than half of it.
        for shift in range(
            round(-math.log(1.03 * steps) / _BIN), round(math.log(2 / steps) / _BIN)
        ):
            mass = near[places + shift - round(low / _BIN)]
            fit = mass.sum() / spikes.sum() * (mass > 0).mean()
            if fit > best:
                best, found = fit, (math.exp((shift + 0.5) * _BIN), steps)
    return found


def _guess_sgd(update: dict[str, Tensor], num_examples: int, batch_size: int | None) -> Guess:
    """Guess the rate of SGD from the bias of the classifier.

    Its gradient is ``p_c - n_c / B`` for class c, with p_c the mean softmax and
    n_c the count of its images: for a class that the client does not hold it
    moves by lr K p_c, the most of all, and an untrained model has p_c = 1 / C.
    """
    tensors = list(update.values())
    last = max((i for i, u in enumerate(tensors) if u.dim() == 2), default=len(tensors))
    bias = tensors[last + 1] if last + 1 < len(tensors) else None
    if bias is None or bias.shape != tensors[last].shape[:1] or not bias.any():
        raise ValueError(
            "the client seems to use sgd, whose learning rate shows in the bias of the classifier; "
            "this model has none: set client.lr"
        )
    steps = math.ceil(num_examples / batch_size) if batch_size else 1
    product = len(bias) * -bias.min().item()
    told = (
        f"sgd by the heavy tail of its moves; lr K = {product:.2g} by the classifier's bias, as of "
        "an untrained model (low where the client holds every class); lr, K and momentum are not "
        f"told apart: K={steps} " + ("by the batch size" if batch_size else "is assumed")
    )
    training = LocalTraining(
        "sgd", lr=product / steps, batch_size=batch_size or num_examples, local_steps=steps
    )
    return Guess(training, told, confident=False)

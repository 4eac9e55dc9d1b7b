"""Guessing a client's local training from its update, where the protocol does not specify it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d, median_filter
from torch import Tensor

from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.matching.adam.fingerprints import single_step_updates

SIGN_LIKE = 0.3  # `spread` above which steps are nearly signs: Adam's, not SGD's
_BIN = 1e-3  # of log |u|; spikes are narrower
_MAX_STEPS = 100  # of Adam, up to which spikes can be distinguished


@dataclass(frozen=True)
class Guess:
    """A guessed local training.

    Attributes
    ----------
    training : LocalTraining
        Without momentum, weight decay and clipping, which are not guessed. BatchNorm
        is in training mode where its running statistics changed, or has none.
    reason : str
        What the guess is based on, and what can't be distinguished.
    confident : bool
        Whether the learning rate and K are expected within 10%.
    """

    training: LocalTraining
    reason: str
    confident: bool


def guess_training(
    observation: Observation, classifier: str, batch_size: int | None = None
) -> Guess:
    """Guess a client's optimiser, learning rate and number of local steps.

    The optimiser follows from the spread of ``|u| = |w0 - w1|``. Adam updates most
    coordinates by about its rate: on clients of this project, 73 to 100% of the changed
    coordinates are within a factor of 10 of the largest. SGD updates them by its rate
    times a heavy-tailed gradient: at most 2% are.

    One pass over the client's N images is assumed, so K is N / B rounded up.

    Parameters
    ----------
    observation : Observation
    classifier : str
        The model's last linear layer, see `fl_app.models.classifier`; "": it has none.
    batch_size : int, optional
        B, where it is known.

    Raises
    ------
    ValueError
        If the update is zero, `batch_size` is below 1, or the client seems to
        use SGD and the model's classifier has no bias, from which its rate follows.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: 1 or more, or None (unknown)")
    update = {name: part.detach() for name, part in observation.update.items()}
    size = torch.cat([u.flatten().abs() for u in update.values()])
    size = size[size > 0]
    if not len(size):
        raise ValueError("the update is zero: the client returned what it was sent")
    guess = (
        _guess_adam(size, observation.num_examples, batch_size)
        if spread(size) > SIGN_LIKE
        else _guess_sgd(update.get(f"{classifier}.bias"), observation.num_examples, batch_size)
    )
    means = [name for name in observation.w0 if name.endswith("running_mean")]
    if not means or any(not torch.equal(observation.w0[n], observation.w1[n]) for n in means):
        return guess
    return replace(
        guess,
        training=replace(guess.training, batch_norm="eval"),
        reason=f"{guess.reason}; BatchNorm in evaluation mode, or its statistics were not returned",
    )


def spread(size: Tensor) -> float:
    """Return the share of changed coordinates within a factor of 10 of the largest.

    Parameters
    ----------
    size : Tensor
        |u| by coordinate, not all zero.
    """
    changed = size[size > 0]
    return (changed > changed.max() / 10).float().mean().item()


def _guess_adam(size: Tensor, num_examples: int, batch_size: int | None) -> Guess:
    """Guess the rate and K of Adam from the sizes of coordinate updates, shape (n,), above 0."""
    sizes = [batch_size] if batch_size else range(1, num_examples + 1)
    allowed = sorted({math.ceil(num_examples / b) for b in sizes})
    reason = "adam by the narrow spread of coordinate updates (adamw looks the same)"
    top = size.max().item()
    found = _fit_spikes(np.log(size.double().cpu().numpy() / top), allowed)
    if found:
        lr, steps = top * found[0], found[1]
        # Rates are usually round numbers, and the inversion of Adam needs the exact one.
        lr = float(f"{lr:.2g}") if abs(float(f"{lr:.2g}") / lr - 1) < 5e-3 else lr
        reason += f"; lr and K={steps} by the coordinates that a single step changed"
    else:
        # A gradient of constant sign gives an update of lr a step. Among several K, the one whose
        # rate is nearest to torch's default is taken.
        steps = min(allowed, key=lambda k: abs(math.log(top / k / 1e-3)))
        lr = top / steps
        given = "the batch size" if batch_size else "torch's default rate of 1e-3"
        reason += f"; lr from the largest update of lr K, with K={steps} by {given}"
    images = batch_size or math.ceil(num_examples / steps)
    training = LocalTraining("adam", lr=lr, batch_size=images, local_steps=steps)
    return Guess(training, reason, confident=found is not None)


def _fit_spikes(sizes: NDArray[np.float64], allowed: list[int]) -> tuple[float, int] | None:
    """Fit Adam's rate and K to the spikes in the distribution of coordinate updates.

    A coordinate that only step j changed (of a unit that only one batch activates) has an
    update of exactly ``lr single_step_updates(K)[j]``. So the histogram has K spikes whose
    distances depend on K alone. The fit is the share of all spikes' mass at the expected
    places, times the share of places with a spike.

    Parameters
    ----------
    sizes : array, shape (n,)
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
    best, found = 0.3, None  # the true K fits by 0.39 or more, measured, and better than others
    for steps in (k for k in allowed if k <= _MAX_STEPS):
        logs = np.log(single_step_updates(steps).numpy())
        places = np.unique(np.round(logs / _BIN).astype(int))
        # The largest update is at most lr K, and hardly less than half of it.
        for shift in range(
            round(-math.log(1.03 * steps) / _BIN), round(math.log(2 / steps) / _BIN)
        ):
            mass = near[places + shift - round(low / _BIN)]
            fit = mass.sum() / spikes.sum() * (mass > 0).mean()
            if fit > best:
                best, found = fit, (math.exp((shift + 0.5) * _BIN), steps)
    return found


def _guess_sgd(bias: Tensor | None, num_examples: int, batch_size: int | None) -> Guess:
    """Guess the rate of SGD from the update of the classifier's bias.

    Its gradient is ``p_c - n_c / B`` for class c, with p_c the mean softmax and
    n_c the count of its images. For a class that the client does not hold the update is
    the largest, lr K p_c, and an untrained model has p_c = 1 / C.
    """
    if bias is None or not bias.any():
        raise ValueError(
            "the client seems to use sgd, whose learning rate follows from the bias of the "
            "classifier; this model has none: set client.lr"
        )
    steps = math.ceil(num_examples / batch_size) if batch_size else 1
    product = len(bias) * -bias.min().item()
    reason = (
        f"sgd by the heavy tail of coordinate updates; lr K = {product:.2g} by the classifier's "
        "bias, as of an untrained model (too low where the client holds every class); lr, K and "
        "momentum can't be distinguished: "
        f"K={steps} " + ("by the batch size" if batch_size else "is assumed")
    )
    training = LocalTraining(
        "sgd", lr=product / steps, batch_size=batch_size or num_examples, local_steps=steps
    )
    return Guess(training, reason, confident=False)

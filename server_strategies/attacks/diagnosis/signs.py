"""The signs of a diagnosis: each is a sentence, or None."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch

from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.diagnosis.calibration import Healthy
from server_strategies.attacks.diagnosis.update import Update
from server_strategies.attacks.matching.guess import SIGN_LIKE
from server_strategies.attacks.matching.surrogate import mean_position

# Factors by which a statistic has to be beyond those of healthy clients, chosen on clients of
# `flowleak bench diagnosis` with other seeds.
_BEYOND = 3.0
_SCALE = 5.0  # of a layer's update, which depends on the images most
_DOUBTFUL = 0.02  # matching loss at the end above which layers are compared
_INSENSITIVE = 0.01  # matching loss between healthy clients that differ in images alone
_GAP = 0.1  # smallest changes over their median, see `Zeros.gap`
_FEW = 8  # numbers of a layer that healthy clients change, at least


def unmatched(losses: Sequence[float], floor: float) -> str | None:
    """Report that the reconstruction does not match: the last loss is over ``floor + 0.3``.

    Attacks that succeed end below 0.22, measured.

    Parameters
    ----------
    losses : sequence of float
    floor : float
        The loss that noise accounts for.
    """
    if not losses or losses[-1] <= floor + 0.3:
        return None
    return (
        f"the reconstruction does not match the update: its matching loss is {losses[-1]:.2f}, "
        f"noise accounts for {floor:.2f}"
    )


def flat(losses: Sequence[float]) -> str | None:
    """Report that the loss is flat: over 0.3, and less than 10% below that of 10 or more ago."""
    if len(losses) < 10 or losses[-1] < 0.3 or losses[-1] < 0.9 * losses[0]:
        return None
    return (
        f"the matching loss hardly fell, from {losses[0]:.2f} to {losses[-1]:.2f}: "
        "is the client's optimiser another than assumed, or are the labels wrong?"
    )


def edge_alpha(alpha: float | None, update: Update) -> str | None:
    """Report that a surrogate's alpha ran to an edge: it ended within 0.01 of 0 or 1.

    Not where it belongs there: a client of one step took its only gradient at w0,
    which is 0, see `mean_position`. With more steps it belongs between 1/9 and 1/2.

    Parameters
    ----------
    alpha : float or None
        None: the objective has none.
    update : Update
    """
    if alpha is None or 0.01 < alpha < 0.99:
        return None
    if abs(alpha - mean_position(update.training, update.steps)) < 0.02:
        return None
    return (
        f"the surrogate's alpha ran to {alpha:.2f}: no model between w0 and w1 reproduces the "
        "update"
    )


def _adam_limit(update: Update) -> float:
    """Return the largest coordinate update by Adam: lr K and 5% (at most 0.4%, measured).

    AdamW's decay adds lr K times itself, for weights of up to 1.
    """
    return update.training.lr * update.steps * (1.05 + update.training.weight_decay)


def _is_adam(training: LocalTraining) -> bool:
    """Return whether what limits Adam's steps limits the client's."""
    return training.adaptive and not training.beyond("drop_last")


def wrong_optimiser(update: Update, healthy: Healthy) -> str | None:
    """Report that the update is not one by the optimiser that the protocol names.

    Adam changes no weight by more than `_adam_limit`. Its coordinate updates have a
    narrow spread where those of SGD have a heavy tail, see `guess_training`; in the largest
    layer, too, where layers have rates of their own. If over 90% are within 1% of the largest,
    they are those of a single step.
    """
    training, steps, longest = update.training, update.steps, update.longest
    spread = update.spread
    odds, narrow = _odds(spread), spread > SIGN_LIKE
    if not training.adaptive:
        if narrow and odds > _BEYOND * healthy.most(lambda each: _odds(each.spread)):
            return (
                "the weights changed by nearly the same amount, as by the sign of a gradient "
                f"(Adam, signSGD), not as by {training.optimizer}"
            )
        return None
    if (
        not narrow
        and _BEYOND * odds < healthy.least(lambda each: _odds(each.spread))
        and _BEYOND * _odds(update.largest_spread)
        < healthy.least(lambda each: _odds(each.largest_spread))
    ):
        return f"coordinate updates have a heavy tail, as SGD's, not {training.optimizer}'s"
    limit = _adam_limit(update) if _is_adam(training) else 0.0
    if longest > limit:
        # Where it is not Adam whose limit is known, steps may depend on the images.
        beyond = 1.0 if limit else _BEYOND
        if longest > beyond * healthy.most(lambda each: each.longest):
            return (
                f"the largest coordinate update is {longest / (training.lr * steps):.3g} lr K, "
                f"which {training.optimizer} can't make: lr or K is larger than assumed, or there "
                "is noise"
            )
    alike = update.alike
    if (
        steps > 1
        and alike > 0.9
        and _odds(alike) > _BEYOND * healthy.most(lambda each: _odds(each.alike))
    ):
        return f"all weights changed alike, as by one step of {training.optimizer}, not {steps}"
    return None


def _sign_like(update: Update) -> bool:
    """Return whether steps are nearly signs of a gradient where the protocol's are not."""
    return not update.training.adaptive and update.spread > SIGN_LIKE


def _odds(share: float) -> float:
    """Return share / (1 - share), finite."""
    return share / (1 - share + 1e-6)


def converged(update: Update, healthy: Healthy) -> str | None:
    """Report that the gradient is close to zero.

    SGD: its mean norm ``|w0 - w1| / (lr K)`` is under 0.05 (an untrained ConvNet's
    is 0.9 to 6, measured). Adam: no coordinate update reaches lr / 5, where a single
    gradient well above eps = 1e-8 gives 0.48 lr or more, see `single_step_updates`.
    """
    if not update.training.adaptive:
        mean = update.mean_gradient
        if mean < 0.05 and _BEYOND * mean < healthy.least(lambda each: each.mean_gradient):
            return f"the gradient is close to zero (mean norm {mean:.1g}): the model has converged"
    elif update.longest < 0.2 * update.training.lr and _BEYOND * update.longest < healthy.least(
        lambda each: each.longest
    ):
        return "no weight changed by a fifth of lr: the gradient is close to zero, or lr is smaller"
    return None


def frozen(update: Update, healthy: Healthy) -> str | None:
    """Report layers that are to be trained and did not change, where healthy clients change them.

    By module: no number of it changed, where every healthy client changed `_FEW` or half of them.
    """
    named = [
        name
        for name, u in update.layers.items()
        if not u.any() and _least_changed(healthy, name) >= min(_FEW, u.numel() / 2)
    ]
    if not named:
        return None
    words, many = ", ".join(named), len(named) > 1
    return (
        f"{f'layers {words}' if many else f'layer {words}'} did not change, though the training "
        f"changes {'them: are they' if many else 'it: is it'} frozen?"
    )


def _least_changed(healthy: Healthy, layer: str) -> float:
    """Return how many numbers of a layer every healthy client changes."""
    return healthy.least(lambda each: float(each.layers[layer].count_nonzero()))


def scaled(update: Update, healthy: Healthy, losses: Sequence[float]) -> str | None:
    """Report layers whose update is longer or shorter than the others', against healthy clients.

    Not where the update was matched: then they are as assumed. Layers are compared with each other,
    as the length of SGD's updates depends on the images. A factor of `_SCALE` beyond all healthy
    clients counts.

    Parameters
    ----------
    update : Update
    healthy : Healthy
    losses : sequence of float
        The matching loss by iteration.
    """
    if not losses or losses[-1] < _DOUBTFUL or not healthy.updates:
        return None
    moved = [n for n, u in update.layers.items() if u.any() and _least_changed(healthy, n)]
    ratios = []
    for each in healthy.updates:
        of = {name: float(update.layers[name].norm() / each.layers[name].norm()) for name in moved}
        ratios.append({name: ratio / median(of.values()) for name, ratio in of.items()})
    words = []
    for name in moved:
        found = [of[name] for of in ratios]
        longer, shorter = min(found), 1 / max(found)
        factor, word = max((longer, "longer"), (shorter, "shorter"))
        if factor > _SCALE:
            words.append(f"{name} is {factor:.2g} times {word}")
    if not words:
        return None
    return (
        f"the update of {', that of '.join(words)}, relative to other layers, than those of "
        "simulated clients: is its learning rate another?"
    )


def hardly_depends(healthy: Healthy, losses: Sequence[float]) -> str | None:
    """Report that the update hardly depends on the images.

    The loss is under 0.05 from the start, and healthy clients that differ in their images alone
    match each other: no loss between two of them is over `_INSENSITIVE`.
    """
    if not losses or losses[0] > 0.05:
        return None
    apart = healthy.apart()
    if apart > _INSENSITIVE:
        return None
    return (
        f"the update hardly depends on the images (other images leave a matching loss of "
        f"{apart:.1g}): what is reconstructed shows the prior, not the client"
    )


def batch_norm(observation: Observation, training: LocalTraining) -> str | None:
    """Report that BatchNorm ran in another mode than the protocol names.

    Its running means differ between w0 and w1 where clients train with their
    batches' statistics and return their own, and only there.
    """
    means = [name for name in observation.w0 if name.endswith("running_mean")]
    changed = any(not torch.equal(observation.w0[n], observation.w1[n]) for n in means)
    if not means or changed == (training.batch_norm == "train" and training.send_buffers):
        return None
    if changed and training.batch_norm == "train":
        return "BatchNorm's running statistics changed, but clients are to return those sent"
    if changed:
        return (
            "BatchNorm's running statistics changed: the client trained with the statistics of its "
            "batches, which an objective in evaluation mode does not reproduce"
        )
    return (
        "BatchNorm's running statistics did not change: the client trained in evaluation mode, "
        "which an objective with the batches' statistics does not reproduce, or returned those "
        "it was sent"
    )


def clipped(update: Update, healthy: Healthy) -> str | None:
    """Report that coordinates were clamped: 10 or more sit at exactly the largest magnitude.

    Exactly: within the weights' rounding. A healthy update of most models has one or two there,
    measured. Adam's single step has most, at lr, and steps along gradients that hardly change have
    many, at lr K: then the largest magnitude tells.
    """
    count, longest = update.ties, update.longest
    training = update.training
    one_step = training.adaptive and update.steps == 1
    if count < 10 or (one_step and longest > 0.99 * training.lr):
        return None
    # A clamp leaves small changes small; steps by signs, which the protocol does not name, do not.
    if _sign_like(update) and update.zeros.gap > _GAP:
        return None
    more = count > _BEYOND * healthy.most(lambda each: each.ties)
    shorter = training.adaptive and longest < 0.9 * healthy.least(lambda each: each.longest)
    if not more and not shorter:
        return None
    or_signs = ", or made by one step along a gradient's signs (Adam, signSGD)"
    return (
        f"{count} weights changed by exactly the largest amount, {longest:.2g}: it was clamped "
        f"there{or_signs * (_sign_like(update) and update.steps == 1)}"
    )


def sparse(update: Update, healthy: Healthy) -> str | None:
    """Report that coordinates were set to zero.

    Dead units leave whole rows and columns of zeros. Sparsification by size leaves
    zeros and, above them, a gap: the smallest 0.1% of the other coordinates end over a
    tenth of their median (healthy: under 2%, measured; not checked for steps that
    are all alike). Random sparsification, or any of steps all alike, leaves zeros
    scattered over rows and columns that are alive: over half of those
    (healthy: under 19%, measured; Adam at lr 0.1, which kills units, 37%).

    Where gradients are so small that the weights' rounding hides them, healthy clients have both.
    """
    zeros = update.zeros
    gap = (
        zeros.share > 0.01
        and not _sign_like(update)  # its dead units leave zeros, and its steps a gap
        and zeros.gap > _GAP
        and zeros.gap > _BEYOND * healthy.most(lambda each: each.zeros.gap)
    )
    scattered = zeros.scattered > 0.5 and _odds(zeros.scattered) > _BEYOND * healthy.most(
        lambda each: _odds(each.zeros.scattered)
    )
    if not gap and not scattered:
        return None
    return (
        f"{zeros.share:.0%} of the weights did not change, more than dead units account for: it is "
        "sparsified"
    )


def noise(update: Update, healthy: Healthy) -> float:
    """Return the standard deviation of noise that healthy clients do not have, or 0.

    See `Update.noise_sigma`. Steps of Adam and its like can look like noise of their size.
    """
    training, sigma = update.training, update.noise_sigma
    if not sigma:
        return 0.0
    if training.adaptive and sigma > training.lr / 4:
        plain = _is_adam(training)
        limit = _adam_limit(update) if plain else healthy.most(lambda each: each.longest)
        if update.longest <= limit:
            return 0.0
    return sigma if sigma > _BEYOND * healthy.most(lambda each: each.noise_sigma) else 0.0


def noisy(sigma: float) -> str | None:
    """Report that the update holds noise, see `noise`."""
    return f"the update carries noise with sigma of about {sigma:.1g}" if sigma else None


def rounded(update: Update, healthy: Healthy) -> str | None:
    """Report that the returned weights are rounded: 99% of them are bfloat16 or float16 exactly."""
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        left = update.unrounded(dtype)
        if left < 0.01 and _BEYOND * left < healthy.least(partial(Update.unrounded, dtype=dtype)):
            return f"the weights came back rounded to {name}, which hides small changes"
    return None

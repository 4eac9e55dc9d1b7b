"""What is likely wrong where an attack fails, from what the server can measure.

Each sign is one function, which returns a sentence or None. Its threshold comes
from clients of this project: ConvNet and MLP, untrained, Adam and SGD, K = 1 to
20, B = 1 to 32, on CIFAR-10. Clients of the other models show no sign, measured
for K = 1 and 5.

Left out, since an update does not show them: a wrong normalisation; clipping of
the whole update's norm; noise in a model without dead units, or of a quarter of
Adam's rate and more, unless it moves a weight further than Adam can; a converged
model under Adam, whose steps hide the gradient's size until it nears eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.defended import noise_part
from server_strategies.attacks.matching.distance import CosineDistance
from server_strategies.attacks.matching.guess import SIGN_LIKE, spread
from server_strategies.attacks.matching.surrogate import mean_position


def diagnose(
    observation: Observation,
    knowledge: Knowledge,
    losses: Sequence[float],
    alpha: float | None,
    at_truth: Callable[[float], float] = CosineDistance.at_truth,
) -> tuple[str, ...]:
    """Return sentences on what is likely wrong; none for a healthy update that was explained.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
    losses : sequence of float
        The matching loss by iteration.
    alpha : float or None
        A surrogate's alpha at the end; None: the objective has none.
    at_truth : callable
        That loss at the true images, by the noise's share of the update's square; see
        `Distance.at_truth`.
    """
    training = knowledge.client
    w0 = [observation.w0[name].detach() for name in observation.trained]
    w1 = [observation.w1[name].detach() for name in observation.trained]
    update = [before - after for before, after in zip(w0, w1, strict=True)]
    size = torch.cat([u.flatten().abs() for u in update]).float()
    if not size.any():
        return ("the update is zero: the client returned what it was sent",)
    steps = len(training.batches(observation.num_examples))
    rounding = rounded(w1)
    # Coarse rounding is noise too, but has a better name.
    sigma = 0.0 if rounding else noise_sigma(w0, update)
    # Adam's own steps can look like noise of their size.
    own = training.optimizer != "sgd" and size.max() <= longest_move(training, steps)
    if own and sigma > training.lr / 4:
        sigma = 0.0
    clamp = clipped(w0, w1, training, steps)
    found = (
        rounding,
        noisy(sigma),
        clamp,
        sparse(update),
        # The moves' spread tells of the optimiser only where nothing has changed it.
        None if rounding or sigma or clamp else wrong_optimiser(size, training, steps),
        converged(size, training, steps),
        batch_norm(observation, training),
        unexplained(losses, at_truth(noise_part(size, sigma))),
        flat(losses),
        edge_alpha(alpha, training, steps),
    )
    return tuple(sentence for sentence in found if sentence)


def unexplained(losses: Sequence[float], floor: float) -> str | None:
    """Say that the reconstruction explains little: the last loss is over ``floor + 0.3``.

    Attacks that succeed end below 0.22, measured.

    Parameters
    ----------
    losses : sequence of float
    floor : float
        What noise explains.
    """
    if not losses or losses[-1] <= floor + 0.3:
        return None
    return (
        f"the reconstruction explains little of the update: its matching loss is {losses[-1]:.2f}, "
        f"noise accounts for {floor:.2f}"
    )


def flat(losses: Sequence[float]) -> str | None:
    """Say that the loss is flat: it fell by less than 10% in 10 iterations or more, to over 0.3."""
    if len(losses) < 10 or losses[-1] < 0.3 or losses[-1] < 0.9 * losses[0]:
        return None
    return (
        f"the matching loss hardly fell, from {losses[0]:.2f} to {losses[-1]:.2f}: "
        "is the client's optimiser another than assumed, or are the labels wrong?"
    )


def edge_alpha(alpha: float | None, training: LocalTraining, steps: int) -> str | None:
    """Say that a surrogate's alpha ran to an edge: it ended within 0.01 of 0 or 1.

    Not where it belongs there: a client of one step took its only gradient at w0,
    which is 0, see `mean_position`. More steps belong between 1/9 and 1/2.

    Parameters
    ----------
    alpha : float or None
    training : LocalTraining
    steps : int
        K.
    """
    if alpha is None or 0.01 < alpha < 0.99:
        return None
    if abs(alpha - mean_position(training, steps)) < 0.02:
        return None
    return (
        f"the surrogate's alpha ran to {alpha:.2f}: no model between w0 and w1 explains the update"
    )


def wrong_optimiser(size: Tensor, training: LocalTraining, steps: int) -> str | None:
    """Say that the moves are not those of the optimiser that the protocol names.

    Adam moves no weight further than `longest_move`, and its moves have a narrow
    spread where those of SGD have a heavy tail, see `guess_training`. Over 90%
    within 1% of the longest are those of a single step.

    Parameters
    ----------
    size : Tensor
        |w0 - w1| by coordinate.
    training : LocalTraining
    steps : int
        K.
    """
    moved = size[size > 0]
    longest = moved.max().item()
    narrow = spread(size) > SIGN_LIKE
    if training.optimizer == "sgd":
        return (
            "the weights moved by nearly the same amount, as by the sign of a gradient (Adam, "
            "signSGD), not as by sgd"
            if narrow
            else None
        )
    if not narrow:
        return f"the moves have a heavy tail, as SGD's, not {training.optimizer}'s"
    if longest > longest_move(training, steps):
        return (
            f"the longest move is {longest / (training.lr * steps):.3g} lr K, which "
            f"{training.optimizer} can't make: lr or K is larger than assumed, or there is noise"
        )
    if steps > 1 and (moved > 0.99 * longest).float().mean() > 0.9:
        return f"all weights moved alike, as by one step of {training.optimizer}, not {steps}"
    return None


def longest_move(training: LocalTraining, steps: int) -> float:
    """Return how far Adam can move a weight: lr K and 5% (0.4% is the most measured).

    AdamW's decay adds lr K times itself, for weights of up to 1.
    """
    return training.lr * steps * (1.05 + training.weight_decay)


def converged(size: Tensor, training: LocalTraining, steps: int) -> str | None:
    """Say that the gradient is close to zero.

    SGD: its mean norm ``|w0 - w1| / (lr K)`` is under 0.05 (an untrained ConvNet's
    is 0.9 to 6, measured). Adam: no move reaches lr / 5, where a single gradient
    well above eps = 1e-8 moves a weight by 0.48 lr or more, see `single_touch_moves`.

    Parameters
    ----------
    size : Tensor
        |w0 - w1| by coordinate.
    training : LocalTraining
    steps : int
        K.
    """
    if training.optimizer == "sgd":
        mean = size.norm().item() / (training.lr * steps)
        if mean < 0.05:
            return f"the gradient is close to zero (mean norm {mean:.1g}): the model has converged"
    elif size.max() < 0.2 * training.lr:
        return "no weight moved by a fifth of lr: the gradient is close to zero, or lr is smaller"
    return None


def batch_norm(observation: Observation, training: LocalTraining) -> str | None:
    """Say that BatchNorm ran in another mode than the protocol names.

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


def clipped(
    w0: Sequence[Tensor], w1: Sequence[Tensor], training: LocalTraining, steps: int
) -> str | None:
    """Say that coordinates were clamped: 10 or more sit at exactly the largest magnitude.

    Exactly: within the weights' rounding. A healthy update has one or two there,
    measured; Adam's single step has most, at lr.

    Parameters
    ----------
    w0, w1 : sequence of Tensor
    training : LocalTraining
    steps : int
        K.
    """
    pairs = list(zip(w0, w1, strict=True))
    size = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    unit = torch.finfo(size.dtype).eps
    error = torch.cat([unit * torch.maximum(a.abs(), b.abs()).flatten() for a, b in pairs])
    longest = size.max().item()
    count = int((size > longest * (1 - 10 * unit) - 2 * error).sum())
    expected = training.optimizer != "sgd" and steps == 1 and longest > 0.99 * training.lr
    if count < 10 or expected:
        return None
    return (
        f"{count} weights moved by exactly the largest amount, {longest:.2g}: it was clamped there"
    )


def sparse(update: Sequence[Tensor]) -> str | None:
    """Say that coordinates were set to zero.

    Dead units leave whole rows and columns of zeros. Sparsification by size leaves
    zeros and, above them, a gap: the smallest 0.1% of the other moves end over a
    tenth of their median (healthy: under 2%, measured; not asked of steps that
    are all alike). Random sparsification, or any of steps all alike, leaves zeros
    scattered over rows and columns that are alive: over half of those
    (healthy: under 19%, measured; Adam at lr 0.1, which kills units, 37%).

    Parameters
    ----------
    update : sequence of Tensor
        w0 - w1 by parameter.
    """
    size = torch.cat([u.flatten().abs() for u in update])
    moved = size[size > 0].sort().values
    share = 1 - len(moved) / len(size)
    smallest, median, longest = (moved[int(q * (len(moved) - 1))] for q in (1e-3, 0.5, 1))
    gap = share > 0.01 and smallest > 0.1 * median and median < 0.9 * longest
    zeros = alive = 0
    for matrix in (u.flatten(1) != 0 for u in update if u.dim() > 1):
        block = matrix[matrix.any(1)][:, matrix.any(0)]
        zeros += int((~block).sum())
        alive += block.numel()
    if not gap and zeros <= alive / 2:
        return None
    return (
        f"{share:.0%} of the weights did not move, more than dead units explain: it is sparsified"
    )


def noise_sigma(w0: Sequence[Tensor], update: Sequence[Tensor]) -> float:
    """Estimate the standard deviation of noise in an update; 0 where there is no sign of it.

    From the rows and columns, of 128 entries or more, of the weight matrices that
    moved least: units and inputs that are dead or nearly so. ``sigma = median |u| /
    0.6745`` over the least 1% of them, at least 4, by their median; that choice
    makes it up to 20% too small, measured. They are noise if `_is_noise` says so.
    The least of all matrices' estimates counts, where it is above four times the
    weights' rounding, and no row of 64 entries or more moved by less than half of it:
    noise is in all of them.

    Parameters
    ----------
    w0, update : sequence of Tensor
        Weights sent, and w0 - w1, by parameter.
    """
    found = []
    for w, u in zip(w0, update, strict=True):
        if u.dim() < 2:
            continue
        rounding = 4 * torch.finfo(u.dtype).eps * w.abs().median().item()
        for rows, weights in ((u.flatten(1), w.flatten(1)), (u.flatten(1).T, w.flatten(1).T)):
            if len(rows) < 8 or rows.shape[1] < 128:
                continue
            chosen = rows.abs().median(1).values.argsort()[: max(4, len(rows) // 100)]
            sigma = rows[chosen].abs().median().item() / 0.6745
            if sigma > rounding and _is_noise(rows[chosen], weights[chosen]):
                found.append(sigma)
    all_rows = [u.flatten(1) if u.dim() > 1 else u[None] for u in update]
    sizes = [r.square().mean(1).sqrt().min().item() for r in all_rows if r.shape[1] >= 64]
    least = min(found, default=0.0)
    return 0.0 if min(sizes, default=0.0) < least / 2 else least


def _is_noise(rows: Tensor, weights: Tensor) -> bool:
    """Say whether rows of an update, (rows, n), are Gaussian noise.

    They are orthogonal: their mean |cosine| is under twice that of Gaussian
    vectors, ``sqrt(2 / (pi n))``; rows of a gradient are mixtures of a few inputs,
    3.5 to 20 times. They are not along the weights, as weight decay is. Their
    fourth moment over the squared second is 3, within 2.5 to 3.7.
    """
    length = rows.norm(dim=1, keepdim=True)
    if not length.all():
        return False
    unit = rows / length
    cosines = (unit @ unit.T).abs()
    between = (cosines.sum() - cosines.trace()) / (len(unit) * (len(unit) - 1))
    along = torch.cosine_similarity(rows, weights).abs().mean()
    kurtosis = rows.pow(4).mean() / rows.square().mean().square()
    return bool(
        between < 2 * (2 / (torch.pi * rows.shape[1])) ** 0.5
        and along < 0.5
        and 2.5 < kurtosis < 3.7
    )


def noisy(sigma: float) -> str | None:
    """Say that the update carries noise, see `noise_sigma`."""
    return f"the update carries noise with sigma of about {sigma:.1g}" if sigma else None


def rounded(w1: Sequence[Tensor]) -> str | None:
    """Say that the weights returned are rounded: 99% of them fit bfloat16 or float16 exactly."""
    weights = torch.cat([w.flatten() for w in w1])
    weights = weights[weights != 0]
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if (weights.to(dtype).to(weights.dtype) == weights).float().mean() > 0.99:
            return f"the weights came back rounded to {name}, which hides small moves"
    return None

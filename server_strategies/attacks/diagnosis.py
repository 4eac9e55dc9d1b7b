"""What is likely wrong where an attack fails, from what the server can measure.

Each sign is one function, which returns a sentence or None. Thresholds are measured on
clients of this project: ConvNet and MLP, untrained, Adam and SGD, K = 1 to 20, B = 1 to
32, on CIFAR-10. Clients of the other models show no sign, measured for K = 1 and 5.

Some faults are left out because an update does not show them: a wrong normalisation;
clipping of the whole update's norm; noise in a model without dead units; noise of a
quarter of Adam's rate or more, unless it changes a weight more than Adam can; a
converged model under Adam, whose steps hide the gradient's size until it is near eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.defended import noise_part
from server_strategies.attacks.matching.distance import CosineDistance
from server_strategies.attacks.matching.guess import SIGN_LIKE, spread
from server_strategies.attacks.matching.surrogate import mean_position


@dataclass(frozen=True)
class Update:
    """An update, and the training that the protocol names for it.

    Attributes
    ----------
    w0, w1 : list of Tensor
        Weights before and after, by parameter.
    training : LocalTraining
    steps : int
        K.
    """

    w0: list[Tensor]
    w1: list[Tensor]
    training: LocalTraining
    steps: int

    @cached_property
    def parts(self) -> list[Tensor]:
        """w0 - w1 by parameter."""
        return [before - after for before, after in zip(self.w0, self.w1, strict=True)]

    @cached_property
    def size(self) -> Tensor:
        """|w0 - w1| by coordinate."""
        return torch.cat([part.flatten().abs() for part in self.parts]).float()

    @property
    def most(self) -> float:
        """The largest coordinate update that Adam can make: lr K and 5% (at most 0.4%, measured).

        AdamW's decay adds lr K times itself, for weights of up to 1.
        """
        return self.training.lr * self.steps * (1.05 + self.training.weight_decay)


def diagnose(
    observation: Observation,
    knowledge: Knowledge,
    losses: Sequence[float],
    alpha: float | None,
    at_truth: Callable[[float], float] = CosineDistance.at_truth,
) -> tuple[str, ...]:
    """Return sentences on what is likely wrong; none for a healthy update that was matched.

    Parameters
    ----------
    observation : Observation
    knowledge : Knowledge
    losses : sequence of float
        The matching loss by iteration.
    alpha : float or None
        A surrogate's alpha at the end; None: the objective has none.
    at_truth : callable
        The loss at the ground truth, by the noise's share of the update's square; see
        `Distance.at_truth`.
    """
    training = knowledge.client
    w0 = [observation.w0[name].detach() for name in observation.trained]
    w1 = [observation.w1[name].detach() for name in observation.trained]
    update = Update(w0, w1, training, len(training.batches(observation.num_examples)))
    if not update.size.any():
        return ("the update is zero: the client returned what it was sent",)
    rounding = rounded(update)
    # Coarse rounding is noise too, but has a better name.
    sigma = 0.0 if rounding else noise_sigma(update)
    # How large steps are is known of plain SGD, Adam and AdamW with cross-entropy alone.
    plain = not training.beyond("drop_last")
    # Adam's own steps can look like noise of their size.
    own = training.adaptive and (not plain or update.size.max() <= update.most)
    if own and (not plain or sigma > training.lr / 4):
        sigma = 0.0
    clamp = clipped(update) if plain or not training.adaptive else None
    found = (
        rounding,
        noisy(sigma),
        clamp,
        sparse(update),
        # The spread shows the optimiser only where nothing has changed the update since.
        None if rounding or sigma or clamp or not plain else wrong_optimiser(update),
        converged(update) if plain else None,
        batch_norm(observation, training),
        unmatched(losses, at_truth(noise_part(update.size, sigma))),
        flat(losses),
        edge_alpha(alpha, update),
    )
    return tuple(sentence for sentence in found if sentence)


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


def wrong_optimiser(update: Update) -> str | None:
    """Report that the update is not one by the optimiser that the protocol names.

    Adam changes no weight by more than `Update.most`. Its coordinate updates have a
    narrow spread where those of SGD have a heavy tail, see `guess_training`. If over
    90% are within 1% of the largest, they are those of a single step.
    """
    training, steps, size = update.training, update.steps, update.size
    changed = size[size > 0]
    longest = changed.max().item()
    narrow = spread(size) > SIGN_LIKE
    if training.optimizer == "sgd":
        return (
            "the weights changed by nearly the same amount, as by the sign of a gradient (Adam, "
            "signSGD), not as by sgd"
            if narrow
            else None
        )
    if not narrow:
        return f"coordinate updates have a heavy tail, as SGD's, not {training.optimizer}'s"
    if longest > update.most:
        return (
            f"the largest coordinate update is {longest / (training.lr * steps):.3g} lr K, which "
            f"{training.optimizer} can't make: lr or K is larger than assumed, or there is noise"
        )
    if steps > 1 and (changed > 0.99 * longest).float().mean() > 0.9:
        return f"all weights changed alike, as by one step of {training.optimizer}, not {steps}"
    return None


def converged(update: Update) -> str | None:
    """Report that the gradient is close to zero.

    SGD: its mean norm ``|w0 - w1| / (lr K)`` is under 0.05 (an untrained ConvNet's
    is 0.9 to 6, measured). Adam: no coordinate update reaches lr / 5, where a single
    gradient well above eps = 1e-8 gives 0.48 lr or more, see `single_step_updates`.
    """
    training, size = update.training, update.size
    if training.optimizer == "sgd":
        mean = size.norm().item() / (training.lr * update.steps)
        if mean < 0.05:
            return f"the gradient is close to zero (mean norm {mean:.1g}): the model has converged"
    elif size.max() < 0.2 * training.lr:
        return "no weight changed by a fifth of lr: the gradient is close to zero, or lr is smaller"
    return None


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


def clipped(update: Update) -> str | None:
    """Report that coordinates were clamped: 10 or more sit at exactly the largest magnitude.

    Exactly: within the weights' rounding. A healthy update has one or two there,
    measured; Adam's single step has most, at lr.
    """
    pairs = list(zip(update.w0, update.w1, strict=True))
    size = torch.cat([part.abs().flatten() for part in update.parts])
    unit = torch.finfo(size.dtype).eps
    error = torch.cat([unit * torch.maximum(a.abs(), b.abs()).flatten() for a, b in pairs])
    longest = size.max().item()
    count = int((size > longest * (1 - 10 * unit) - 2 * error).sum())
    training = update.training
    one_step = training.optimizer != "sgd" and update.steps == 1
    if count < 10 or (one_step and longest > 0.99 * training.lr):
        return None
    return (
        f"{count} weights changed by exactly the largest amount, {longest:.2g}: it was clamped "
        "there"
    )


def sparse(update: Update) -> str | None:
    """Report that coordinates were set to zero.

    Dead units leave whole rows and columns of zeros. Sparsification by size leaves
    zeros and, above them, a gap: the smallest 0.1% of the other coordinates end over a
    tenth of their median (healthy: under 2%, measured; not checked for steps that
    are all alike). Random sparsification, or any of steps all alike, leaves zeros
    scattered over rows and columns that are alive: over half of those
    (healthy: under 19%, measured; Adam at lr 0.1, which kills units, 37%).
    """
    size = torch.cat([u.flatten().abs() for u in update.parts])
    changed = size[size > 0].sort().values
    share = 1 - len(changed) / len(size)
    smallest, median, longest = (changed[int(q * (len(changed) - 1))] for q in (1e-3, 0.5, 1))
    gap = share > 0.01 and smallest > 0.1 * median and median < 0.9 * longest
    zeros = alive = 0
    for matrix in (u.flatten(1) != 0 for u in update.parts if u.dim() > 1):
        block = matrix[matrix.any(1)][:, matrix.any(0)]
        zeros += int((~block).sum())
        alive += block.numel()
    if not gap and zeros <= alive / 2:
        return None
    return (
        f"{share:.0%} of the weights did not change, more than dead units account for: it is "
        "sparsified"
    )


def noise_sigma(update: Update) -> float:
    """Estimate the standard deviation of noise in an update; 0 where there is no sign of it.

    From those rows and columns of the weight matrices, of 128 entries or more, that
    changed least: units and inputs that are dead or nearly so. ``sigma = median |u| /
    0.6745`` over the least 1% of them, at least 4, by their median; this selection
    makes it up to 20% too small, measured. They have to pass `_is_noise`. The least of
    all matrices' estimates counts if it is above four times the weights' rounding and
    every row of 64 entries or more changed by at least half of it: noise is in all rows.
    """
    found = []
    for w, u in zip(update.w0, update.parts, strict=True):
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
    all_rows = [u.flatten(1) if u.dim() > 1 else u[None] for u in update.parts]
    sizes = [r.square().mean(1).sqrt().min().item() for r in all_rows if r.shape[1] >= 64]
    least = min(found, default=0.0)
    return 0.0 if min(sizes, default=0.0) < least / 2 else least


def _is_noise(rows: Tensor, weights: Tensor) -> bool:
    """Return whether rows of an update, (rows, n), are Gaussian noise.

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
    """Report that the update holds noise, see `noise_sigma`."""
    return f"the update carries noise with sigma of about {sigma:.1g}" if sigma else None


def rounded(update: Update) -> str | None:
    """Report that the returned weights are rounded: 99% of them are bfloat16 or float16 exactly."""
    weights = torch.cat([w.flatten() for w in update.w1])
    weights = weights[weights != 0]
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if (weights.to(dtype).to(weights.dtype) == weights).float().mean() > 0.99:
            return f"the weights came back rounded to {name}, which hides small changes"
    return None

"""The classifier's input of every image, from the classifier's own update.

A linear classifier of weight W and bias b moves in local step k by the gradient
``G_k = 1/B sum_n (p_n - y_n) (f_n, 1)'`` over the step's images n, with its input f_n, the
probabilities p_n = softmax(W_k f_n + b_k), and the one-hot label y_n. SGD's update in units
of its learning rate is ``R = sum_k c_k G_k``, with c_k = 1, and more for early steps with
momentum. For one image R is known up to p, so that f is a row of W's update divided by its
bias's (Geiping et al., 2020; Zhu & Blaschko, 2021, R-GAP). For several the p_n follow from
the f_n, and the f_n from the p_n: alternating least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_app.models import classifier
from fl_app.models.extensions import random_layers
from fl_app.protocol import Defense, Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.gradient import constant_gradient_speeds

_ROUNDS = 300  # of alternating least squares
_APART = 0.5  # relative noise of a second start
_SETTLED = 1e-10  # relative change of the features at which they end
_UNSETTLED = 30.0  # most that the error is multiplied by, so that fits near rounding stay known


@dataclass(frozen=True)
class StepFeatures:
    """What went into the classifier in every local step.

    Attributes
    ----------
    values : Tensor, shape (N, D)
        Of each image at the weights of its own step, in training order.
    error : Tensor, shape (N,)
        Expected relative error of each, at most 1: by what the features do not fit of the
        update beyond the weights' rounding, how well the equations separate an image from the
        others, and how far another start ends from this one. Large: the update has the
        image only in a sum with others, or the least squares have not settled.
    """

    values: Tensor
    error: Tensor


def step_features(model: nn.Module, observation: Observation, knowledge: Knowledge) -> StepFeatures:
    """Return the classifier's input of every image, at the weights of its local step.

    The least squares are regularised by ``|f_n - m|^2``, with m the mean that the
    largest rows tell of all images, weighted by the noise of the equations: what they do not
    separate, such as two images of one label in one step, becomes equal.

    Parameters
    ----------
    model : nn.Module
        The client's; its parameters are not read.
    observation : Observation
    knowledge : Knowledge
        With the client's training and labels.

    Raises
    ------
    ValueError
        If the features don't follow: without labels, of another optimiser than SGD, with weight
        decay, clipping or a defence, if an image is trained on more or less than once, or if the
        model does not end in a linear classifier that trains.
    """
    training = knowledge.client
    name = classifier(model)
    why = _unfit(name, model, observation, knowledge)
    if why:
        raise ValueError(f"the classifier's input does not follow from the update: {why}")
    labels = torch.tensor(knowledge.labels)
    w0, w1 = (
        torch.cat([w[f"{name}.weight"].double(), w[f"{name}.bias"].double()[:, None]], 1).cpu()
        for w in (observation.w0, observation.w1)
    )
    moved = (w0 - w1) / training.lr
    # Each step stores a weight to half a unit in its last place.
    unit = torch.finfo(observation.w0[f"{name}.weight"].dtype).eps / 2
    batches = training.batches(observation.num_examples)
    rounding = unit * float(w0.square().mean().sqrt()) * len(batches) ** 0.5 / training.lr
    # A label's row is mostly its own images' features: the first guess of them all.
    own = labels.unique()
    mean = moved[own, :-1].sum(0) / moved[own, -1].sum()
    start = mean.expand(len(labels), -1)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=start.dtype)
    first, other = (
        _alternate(w0, moved, labels, batches, training, rounding, each)
        for each in (start, start * (1 + _APART * noise))
    )
    # What another start ends elsewhere for does not follow from the update.
    apart = (first.values - other.values).norm(dim=1) / first.values.norm(dim=1).clamp(min=1e-30)
    return StepFeatures(first.values, torch.maximum(first.error, apart).clamp(max=1))


def _unfit(name: str, model: nn.Module, observation: Observation, knowledge: Knowledge) -> str:
    training, count = knowledge.client, observation.num_examples
    if not name or f"{name}.bias" not in observation.w0:
        return "the model does not end in a linear layer with a bias"
    if random_layers(model):
        return "the model has random layers in front of its classifier"
    if knowledge.labels is None:
        return "the labels are not known"
    if training.optimizer != "sgd":
        return f"optimizer is {training.optimizer}; allowed: sgd"
    for setting in ("weight_decay", "max_grad_norm"):
        if getattr(training, setting):
            return f"{setting} is {getattr(training, setting)}; allowed: 0"
    if knowledge.defense != Defense():
        return f"the client's defence is {knowledge.defense}"
    beyond = training.beyond("drop_last")
    if beyond:
        return beyond
    if sorted(image for batch in training.batches(count) for image in batch) != list(range(count)):
        return "not every image is trained on once"
    return ""


def _alternate(
    w0: Tensor,
    moved: Tensor,
    labels: Tensor,
    batches: Sequence[Sequence[int]],
    training: LocalTraining,
    rounding: float,
    start: Tensor,
) -> StepFeatures:
    """Return the features by alternating least squares, in float64, and their standard error.

    Parameters
    ----------
    w0, moved : Tensor, shape (classes, D + 1)
        The classifier with its bias as the last column, and R.
    labels : Tensor of int64, shape (N,)
    batches : sequence of sequences of int
        Images by local step.
    training : LocalTraining
    rounding : float
        Standard deviation of R's rounding.
    start : Tensor, shape (N, D)
    """
    classes, count = len(w0), len(labels)
    one_hot = torch.eye(classes, dtype=w0.dtype)[labels]
    speeds = constant_gradient_speeds(training, len(batches))[::-1]
    worth = torch.zeros(count, dtype=w0.dtype)
    for speed, batch in zip(speeds, batches, strict=True):
        worth[list(batch)] = speed / len(batch)
    values, mean = start, start.mean(0)
    scale = float(mean.square().mean().sqrt())
    noise, d = rounding, worth[:, None] * (1 / classes - one_hot)
    for _ in range(_ROUNDS):
        d = worth[:, None] * (_probabilities(w0, values, one_hot, batches, training) - one_hot)
        ridge = max(noise / scale, 1e-12) ** 2 if scale else 1e-24
        normal = d @ d.T + ridge * torch.eye(count, dtype=d.dtype)
        before, values = (
            values,
            torch.linalg.solve(normal, d @ moved[:, :-1] + ridge * mean.expand(count, -1)),
        )
        left = moved - d.T @ torch.cat([values, torch.ones_like(values[:, :1])], 1)
        noise = max(rounding, float(left.square().mean().sqrt()))
        if (values - before).norm() <= _SETTLED * values.norm():
            break
    # Standard error of least squares with this noise, and a prior of variance scale^2.
    normal = d @ d.T / noise**2 + torch.eye(count, dtype=d.dtype) / max(scale, 1e-30) ** 2
    spread = torch.linalg.inv(normal).diagonal().sqrt()
    size = values.square().mean(1).sqrt().clamp(min=1e-30)
    # What is left beyond rounding is no noise: the p_n are still wrong, and the features with them.
    spread = spread * min(noise / max(rounding, 1e-30), _UNSETTLED)
    return StepFeatures(values.float(), (spread / size).clamp(max=1).float())


def _probabilities(
    w0: Tensor,
    values: Tensor,
    one_hot: Tensor,
    batches: Sequence[Sequence[int]],
    training: LocalTraining,
) -> Tensor:
    """Return the p_n, shape (N, classes), that features have as the classifier moves with them."""
    extended = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    found = torch.zeros_like(one_hot)
    gradients: list[Tensor] = []
    for step, batch in enumerate(batches):
        speeds = constant_gradient_speeds(training, step)[::-1]
        w = w0 - training.lr * sum(
            (c * g for c, g in zip(speeds, gradients, strict=True)), start=torch.zeros_like(w0)
        )
        places = list(batch)
        found[places] = (extended[places] @ w.T).softmax(1)
        gradients.append((found[places] - one_hot[places]).T @ extended[places] / len(places))
    return found

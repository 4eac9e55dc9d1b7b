"""Defences that are part of the model: random layers before its classifier.

What such a layer draws for a batch is one tensor, its noise. It can be given instead
of drawn, so that who attacks a client can fit it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.protocol import LocalTraining


class RandomLayer(nn.Module, ABC):
    """A layer whose output depends on noise, sampled again for every batch.

    Parameters
    ----------
    size : int
        Numbers that it draws for an image.

    Attributes
    ----------
    mean : float
        Of its noise.
    low, high : float
        Least and most that its noise can be.
    given : Tensor, shape (batch, size), or None
        Noise that is used in the place of a draw.
    """

    def __init__(self, size: int, mean: float, low: float, high: float) -> None:
        super().__init__()
        self.size, self.mean, self.low, self.high = size, mean, low, high
        self.given: Tensor | None = None

    @abstractmethod
    def draw(self, like: Tensor) -> Tensor:
        """Return noise, shape (batch, size), of the type and device of `like` (batch, ...)."""
        ...

    def noise(self, x: Tensor) -> Tensor:
        """Return the noise that was given, or draw it, for inputs (batch, width)."""
        return self.draw(x) if self.given is None else self.given


class Bottleneck(RandomLayer):
    """PRECODE: a variational bottleneck (Scheliga, Maeder & Seeland, WACV 2022).

    ``mu, s = Linear(d, 2k)(h)``, ``z = mu + softplus(s) eps`` with eps from
    N(0, I), ``Linear(k, d)(z)``; in evaluation too. Its own part of the loss is
    ``beta KL(N(mu, softplus(s)^2) || N(0, I)) / ln 2``, in bits, the mean over
    the batch.

    Parameters
    ----------
    width : int
        d, of the input and of the output.
    size : int
        k.
    beta : float
        The authors' is 1e-3.

    Attributes
    ----------
    penalty : Tensor, shape ()
        The loss's part that the last batch has.
    """

    def __init__(self, width: int, size: int, beta: float = 1e-3) -> None:
        super().__init__(size, 0.0, -math.inf, math.inf)
        self.beta = beta
        self.encode = nn.Linear(width, 2 * size)
        self.decode = nn.Linear(size, width)
        self.penalty = torch.zeros(())

    def draw(self, like: Tensor) -> Tensor:
        """See `RandomLayer`."""
        return torch.randn(len(like), self.size, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, shape (batch, width), for x of the same shape."""
        mu, raw = self.encode(x).chunk(2, 1)
        std = F.softplus(raw)
        divergence = 0.5 * (mu.square() + std.square() - 1).sum(1) - std.log().sum(1)
        self.penalty = self.beta * divergence.mean() / math.log(2)
        return self.decode(mu + std * self.noise(x))


class MaskDropout(RandomLayer):
    """Dropout: ``x mask / (1 - p)``, as `torch.nn.Dropout`; its noise is the mask.

    Parameters
    ----------
    width : int
        Numbers of the input, for each image.
    p : float
        Share of zeros in a mask, in (0, 1).
    own : bool
        Whether the layer is the model's own, which who knows the model knows, or a defence
        (`Defense.dropout`).
    """

    def __init__(self, width: int, p: float, own: bool = False) -> None:
        super().__init__(width, 1 - p, 0.0, 1.0)
        self.p, self.own = p, own

    def draw(self, like: Tensor) -> Tensor:
        """See `RandomLayer`."""
        kept = torch.rand(len(like), self.size, dtype=like.dtype, device=like.device) >= self.p
        return kept.to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of x's shape (batch, ...); in evaluation x itself."""
        return x * self.noise(x).view_as(x) / (1 - self.p) if self.training else x


def extend(model: nn.Module, precode: int, dropout: float) -> None:
    """Put random layers between a model's features and its classifier, in place.

    Parameters
    ----------
    model : nn.Module
        One of `fl_app.models`, whose `classifier` is linear.
    precode : int
        k of a `Bottleneck`; 0: none.
    dropout : float
        p of a `MaskDropout`, behind it; 0: none.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    if precode < 0:
        raise ValueError(f"precode is {precode}; allowed: 0 (none) or more")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; allowed: 0 (none) to less than 1")
    if not (precode or dropout):
        return
    classifier = model.classifier
    assert isinstance(classifier, nn.Linear)
    width = classifier.in_features
    layers: list[nn.Module] = [Bottleneck(width, precode)] if precode else []
    layers += [MaskDropout(width, dropout)] if dropout else []
    model.classifier = nn.Sequential(*layers, classifier)


def random_layers(model: nn.Module) -> list[RandomLayer]:
    """Return a model's random layers, in the order that they run in."""
    return [layer for layer in model.modules() if isinstance(layer, RandomLayer)]


@contextmanager
def given_noise(model: nn.Module, noise: Sequence[Tensor]) -> Iterator[None]:
    """Run a model with noise that is given.

    Parameters
    ----------
    model : nn.Module
    noise : sequence of Tensor, shape (batch, size)
        One for each of `random_layers`; empty: they draw it.
    """
    layers = random_layers(model) if noise else []
    try:
        for layer, given in zip(layers, noise, strict=True):
            layer.given = given
        yield
    finally:
        for layer in layers:
            layer.given = None


def local_loss(model: nn.Module, logits: Tensor, labels: Tensor, training: LocalTraining) -> Tensor:
    """Return what a client minimises, shape (): `LocalTraining.loss` and its model's own part.

    Without FedProx's term, which depends on the weights alone.

    Parameters
    ----------
    model : nn.Module
        That gave the logits, in its last call.
    logits : Tensor, shape (N, num_classes)
    labels : Tensor
        Classes, shape (N,) of int64, or their probabilities, shape (N, num_classes).
    training : LocalTraining

    Raises
    ------
    ValueError
        If there are not as many class weights as classes.
    """
    own = [layer.penalty for layer in model.modules() if isinstance(layer, Bottleneck)]
    return sum(own, _of_labels(logits, labels, training))


def _of_labels(logits: Tensor, labels: Tensor, training: LocalTraining) -> Tensor:
    """Return the loss of a batch's logits, shape ()."""
    if callable(training.loss):
        return training.loss(logits, labels)
    if training.loss == "cross_entropy":
        return _cross_entropy(logits, labels, training)
    shares = labels if labels.dim() == 2 else F.one_hot(labels, logits.shape[1]).to(logits)
    if training.loss == "mse":
        return F.mse_loss(logits, shares)
    return F.binary_cross_entropy_with_logits(logits, shares)


def _cross_entropy(logits: Tensor, labels: Tensor, training: LocalTraining) -> Tensor:
    smoothing = training.label_smoothing
    if not training.class_weights:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    weights = logits.new_tensor(training.class_weights)
    if len(weights) != logits.shape[1]:
        raise ValueError(f"{len(weights)} class_weights; allowed: {logits.shape[1]}, one a class")
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    # For probabilities torch divides by the number of images, not by their weights.
    total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
    return total / (labels @ weights).sum()

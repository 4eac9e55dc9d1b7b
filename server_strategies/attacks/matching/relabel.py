"""Labels of images whose order is not known, by the training of the classifier's last layer.

What the last layer does in training follows from its inputs and the labels alone. So
with the inputs of the images found so far, each assignment of labels to images has a
displacement of that layer, and the observed one tells which is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.models import classifier
from fl_app.protocol import LocalTraining
from fl_app.protocol.optimizer import create_optimizer

_MOST = 8  # changes of labels in one call
_GAIN = 1e-3  # share of the misfit that a change has to gain


def last_layer(
    model: nn.Module,
    w0: Mapping[str, Tensor],
    w1: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    training: LocalTraining,
) -> LastLayer | None:
    """Return the last layer of a model in training; None where it has no such layer, or one step.

    Parameters
    ----------
    model : nn.Module
    w0, w1 : mapping of str to Tensor
        Its parameters before and after.
    batches, training
        See `LastLayer`.
    """
    name = classifier(model)
    if not name or len(batches) < 2 or f"{name}.weight" not in w0:
        return None
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    parts = [f"{name}.weight"] + [f"{name}.bias"] * (layer.bias is not None)
    before, after = (
        torch.cat([w[part].view(layer.out_features, -1) for part in parts], 1) for w in (w0, w1)
    )
    return LastLayer(before, after, batches, training, layer) if (after != before).any() else None


@contextmanager
def recorded(last: LastLayer | None, inputs: list[Tensor]) -> Iterator[None]:
    """Append what goes into the last layer, if any, with a column of ones where it has a bias."""
    if last is None:
        yield
        return

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach()
        inputs.append(rows if last.layer.bias is None else F.pad(rows, (0, 1), value=1.0))

    handle = last.layer.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class LastLayer:
    """The last layer before and after the client's training.

    Attributes
    ----------
    before, after : Tensor, shape (C, d)
        With a bias as a last column.
    batches : sequence of Tensor
        By local step, the indices of its images.
    training : LocalTraining
    layer : nn.Linear
    """

    before: Tensor
    after: Tensor
    batches: Sequence[Tensor]
    training: LocalTraining
    layer: nn.Linear

    @torch.no_grad()
    def misfit(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return how far each assignment's displacement is from the observed one, shape (S,).

        The mean of ``|simulated - observed|`` over the mean of ``|observed|``: Adam's
        steps have about the same length wherever labels are right or wrong, and a square
        would count little but the largest.

        Parameters
        ----------
        inputs : sequence of Tensor, shape (B, d)
            By local step, of its images, with a column of ones where there is a bias.
        labels : Tensor of int64, shape (S, N)
            Of all images, in S assignments.
        """
        classes = len(self.before)
        weights = nn.Parameter(self.before.expand(len(labels), *self.before.shape).clone())
        optimizer = create_optimizer({"classifier": weights}, self.training)
        for batch, rows in zip(self.batches, inputs, strict=True):
            slopes = (rows @ weights.transpose(1, 2)).softmax(2)
            slopes = (slopes - F.one_hot(labels[:, batch], classes)) / len(rows)
            weights.grad = slopes.transpose(1, 2) @ rows
            optimizer.step()
        seen = self.after - self.before
        return (weights - self.before - seen).abs().mean((1, 2)) / seen.abs().mean()

    def relabelled(
        self, inputs: Sequence[Tensor], labels: Tensor, free: Tensor, counted: bool
    ) -> Tensor:
        """Return labels that fit the observed displacement better, shape (N,).

        In each step the best change is made: of two images that swap their labels or, where
        the counts are not given, of one image that takes another.

        Parameters
        ----------
        inputs
            See `misfit`.
        labels : Tensor of int64, shape (N,)
        free : Tensor of bool, shape (N,)
            Images whose labels may change.
        counted : bool
            Whether how many images each class has is given.
        """
        best = self.misfit(inputs, labels[None])[0]
        for _ in range(_MOST):
            others = self._changes(labels, free, counted)
            if not len(others):
                break
            misfit, place = self.misfit(inputs, others).min(0)
            if not bool(misfit < (1 - _GAIN) * best):
                break
            best, labels = misfit, others[place]
        return labels

    def _changes(self, labels: Tensor, free: Tensor, counted: bool) -> Tensor:
        """Return every assignment that is one change away, shape (S, N)."""
        step = torch.zeros_like(labels)
        for number, batch in enumerate(self.batches):
            step[batch] = number
        places, of, when = free.nonzero()[:, 0].tolist(), labels.tolist(), step.tolist()
        changes = []
        for a, b in combinations(places, 2):
            if of[a] != of[b] and when[a] != when[b]:
                other = labels.clone()
                other[a], other[b] = of[b], of[a]
                changes.append(other)
        for a in places if not counted else ():
            for c in range(len(self.before)):
                if c != of[a]:
                    other = labels.clone()
                    other[a] = c
                    changes.append(other)
        return torch.stack(changes) if changes else labels[None][:0]

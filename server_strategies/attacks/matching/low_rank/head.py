"""What follows a linear layer in a model: its training follows from the layer's inputs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Weights = dict[str, Tensor]


class Head:
    """A model from one of its linear layers on, given what goes into that layer.

    The layer's input is replaced by given features while the model runs on one image that
    does not matter, so that every model is cut in the same way.

    Parameters
    ----------
    model : nn.Module
        Its own weights are not read.
    layer : str
        The linear layer's name.
    shape : tuple of int
        (C, H, W) of an image.

    Attributes
    ----------
    names : tuple of str
        The head's parameters, the layer's among them.
    sealed : bool
        Whether nothing but the layer's input reaches the logits, so that the head's
        gradients follow from the features.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], layer: str, shape: tuple[int, ...]
    ) -> None:
        self.model, self.layer = model, layer
        like = next(iter(weights.values()))
        self._image = like.new_zeros(1, *shape)
        self._others = {name: w.detach() for name, w in weights.items()}
        self.names: tuple[str, ...] = tuple(weights)
        width = weights[f"{layer}.weight"].shape[1]
        probe = like.new_ones(2, width)
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        logits = self(leaves, probe)
        slopes = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
        pairs = zip(leaves, slopes, strict=True)
        self.names = tuple(name for name, slope in pairs if slope is not None)
        self._image = torch.rand_like(self._image)
        with torch.no_grad():
            self.sealed = torch.equal(logits.detach(), self(weights, probe))
        self._image.zero_()

    def __call__(self, weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return the logits, shape (N, num_classes), of features (N, in)."""
        return self._run(weights, features)[1]

    def slopes(self, weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return every class's slope of the loss at the layer's output, by image.

        Parameters
        ----------
        weights : mapping of str to Tensor
            The head's.
        features : Tensor, shape (N, in)

        Returns
        -------
        Tensor, shape (N, num_classes, out)
            Of the cross-entropy of one image, were its label that class.
        """
        with torch.enable_grad():
            output, logits = self._run(weights, features)
            classes = logits.shape[1]
            each = torch.eye(classes, dtype=logits.dtype, device=logits.device)
            rows = [each[c].expand_as(logits) for c in range(classes)]
            # The loss's slope at the logits is p - y: one pull-back for p, one for each class.
            by_class = torch.stack(
                [torch.autograd.grad(logits, output, row, retain_graph=True)[0] for row in rows], 1
            )
        p = logits.detach().softmax(1)
        mean = (p[:, :, None] * by_class).sum(1, keepdim=True)
        return mean - by_class

    def gradient(
        self, weights: Mapping[str, Tensor], features: Tensor, labels: Tensor
    ) -> tuple[Weights, Tensor, Tensor]:
        """Return one local step's gradient of the head, and what goes back from it.

        Parameters
        ----------
        weights : mapping of str to Tensor
            The head's.
        features : Tensor, shape (B, in)
        labels : Tensor of int64, shape (B,)

        Returns
        -------
        gradient : dict of str to Tensor
            Of the mean cross-entropy, by parameter.
        inwards : Tensor, shape (B, in)
            The slopes of that mean in the features.
        outwards : Tensor, shape (B, out)
            Its slopes at the layer's output.
        """
        leaves = {name: weights[name].detach().requires_grad_() for name in self.names}
        inputs = features.detach().requires_grad_()
        with torch.enable_grad():
            output, logits = self._run(leaves, inputs)
            loss = F.cross_entropy(logits, labels)
            parts = torch.autograd.grad(loss, [*leaves.values(), inputs, output])
        return dict(zip(leaves, parts, strict=False)), parts[-2], parts[-1]

    def _run(self, weights: Mapping[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        with _replaced(self.model.get_submodule(self.layer), features, kept):
            logits = functional_call(self.model, {**self._others, **weights}, (self._image,))
        return kept[0], logits


@contextmanager
def _replaced(layer: nn.Module, features: Tensor, kept: list[Tensor]) -> Iterator[None]:
    """While it is entered, a layer takes `features`, and its output is added to `kept`."""

    def before(_: nn.Module, __: tuple[Any, ...]) -> tuple[Tensor]:
        return (features,)

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        kept.append(output.requires_grad_() if not output.requires_grad else output)
        return kept[-1]

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

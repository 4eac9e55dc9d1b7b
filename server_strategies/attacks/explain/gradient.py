"""The gradient that a client takes at given weights, differentiable in its images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def loss_gradient(
    model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, labels: Tensor
) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy, one tensor a weight.

    Parameters
    ----------
    model : nn.Module
        Gives the architecture; its own weights are not read.
    weights : mapping of str to Tensor
        By parameter name; each requires a gradient.
    x : Tensor, shape (N, C, H, W)
        Normalised images.
    labels : Tensor
        Classes, shape (N,) of int64, or their probabilities, shape (N, classes).
    """
    loss = F.cross_entropy(functional_call(model, dict(weights), (x,)), labels)
    return list(torch.autograd.grad(loss, list(weights.values()), create_graph=True))

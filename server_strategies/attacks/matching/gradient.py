"""The gradient that a client takes at given weights, differentiable in its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_app.models.extensions import given_noise, local_loss
from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.fast_layers import Layers, laid_out


def client_loss(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    training: LocalTraining,
    noise: Sequence[Tensor] = (),
    layers: Layers | None = None,
) -> Tensor:
    """Return a client's `local_loss`, shape (), at given weights.

    Parameters
    ----------
    model, weights, x, labels, training, noise
        See `loss_gradient`.
    layers : Layers, optional
        Computes in another order of sums than a client does on a CPU, and faster.
    """
    if layers:
        x = laid_out(x)
        weights = {name: laid_out(weight) for name, weight in weights.items()}
    with given_noise(model, noise), layers or nullcontext():
        return local_loss(model, functional_call(model, dict(weights), (x,)), labels, training)


def loss_gradient(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    training: LocalTraining,
    noise: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the gradient of a client's `local_loss`, one tensor a weight; 0 for frozen ones.

    Parameters
    ----------
    model : nn.Module
        Defines the architecture; its own weights are not read.
    weights : mapping of str to Tensor
        By parameter name; each that is trained requires a gradient.
    x : Tensor, shape (N, C, H, W)
        Normalised images.
    labels : Tensor
        Classes, shape (N,) of int64, or their probabilities, shape (N, classes).
    training : LocalTraining
        The loss, and which weights are trained.
    noise : sequence of Tensor
        Noise of the model's random layers, see `given_noise`.
    """
    loss = client_loss(model, weights, x, labels, training, noise, Layers())
    trained = {name: w for name, w in weights.items() if training.trains(name)}
    parts = torch.autograd.grad(loss, list(trained.values()), create_graph=True)
    gradient = dict(zip(trained, parts, strict=True))
    return [gradient[n] if n in gradient else torch.zeros_like(w) for n, w in weights.items()]


def constant_gradient_speeds(training: LocalTraining, num_steps: int) -> list[float]:
    """Return the update of a weight by each step along a gradient of 1, in units of lr.

    1 in every step without momentum; with it ``v_k = mu v_(k-1) + 1``, or
    ``1 + mu v_k`` for Nesterov. By linearity, the n-th last gradient
    contributes the n-th speed to the whole displacement.

    Parameters
    ----------
    training : LocalTraining
    num_steps : int
        K.
    """
    velocity, speeds = 0.0, []
    for _ in range(num_steps):
        velocity = training.momentum * velocity + 1
        speeds.append(1 + training.momentum * velocity if training.nesterov else velocity)
    return speeds

"""Which linear layers of a model have an update whose terms can be separated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fl_app.models.extensions import random_layers
from fl_app.protocol import Knowledge
from server_strategies.attacks.matching.adam.decode import traced
from server_strategies.attacks.matching.base import channel_scale
from server_strategies.attacks.matching.low_rank.head import Head
from server_strategies.attacks.matching.low_rank.spectrum import Matrix

_PROBES = 16  # images of noise by which the range of a layer's inputs is seen
_ZEROS = 0.02  # share of exact zeros that a ReLU in front of a layer leaves at least
_ENOUGH = 0.25  # inputs, as a share of an image's numbers, from which images can be decoded


@dataclass(frozen=True)
class Layer:
    """A linear layer of which every image gives one row, with bounded inputs.

    Attributes
    ----------
    name : str
    head : Head
        The model from there on.
    low : float or array, shape (in,)
        Lower bound of its inputs.
    high : array, shape (in,), or None
        Upper bound, if there is one.
    """

    name: str
    head: Head
    low: float | Matrix
    high: Matrix | None


def bounded_layers(
    model: nn.Module, weights: Mapping[str, Tensor], knowledge: Knowledge
) -> Iterator[Layer]:
    """Yield the layers that may be separated, in the order in which they run.

    A layer's inputs are pixels, which have a range, or they come out of a ReLU, possibly
    pooled, so that none of them is negative and some are zero. That is seen by running the
    model on images of noise. Layers with far fewer inputs than an image has numbers are left
    out: no image follows from them.

    Parameters
    ----------
    model : nn.Module
        In the client's mode.
    weights : mapping of str to Tensor
        Its parameters.
    knowledge : Knowledge
    """
    if random_layers(model):
        return
    like = next(iter(weights.values()))
    shape = knowledge.image_shape
    mean, std = (part.to(like) for part in channel_scale(knowledge, like.device))
    generator = torch.Generator().manual_seed(0)
    # Smooth noise activates units as images do; white noise hardly any in a deep model.
    coarse = torch.rand(_PROBES, shape[0], 4, 4, generator=generator).to(like)
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="bilinear")
    probe = ((smooth + 0.1 * torch.randn(smooth.shape, generator=generator).to(like)) - mean) / std
    names = [
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None
    ]
    with torch.no_grad():
        inputs, _, _ = traced(model, weights, probe, [name for name in names if name in weights])
    for weight, value in inputs.items():
        name = weight.removesuffix(".weight")
        if value.dim() != 2 or value.shape[1] < _ENOUGH * probe[0].numel():
            continue
        pixels = value.shape == probe.flatten(1).shape and torch.equal(value, probe.flatten(1))
        bounded = bool((value >= 0).all()) and bool((value == 0).float().mean() > _ZEROS)
        if not (pixels or bounded):
            continue
        head = Head(model, weights, name, shape)
        if not head.sealed:
            continue
        if pixels:
            low, high = (_flat((bound - mean) / std, shape) for bound in (0.0, 1.0))
            yield Layer(name, head, low, high)
        else:
            yield Layer(name, head, 0.0, None)


def _flat(bound: Tensor, shape: tuple[int, ...]) -> Matrix:
    values: Matrix = bound.expand(shape).flatten().double().cpu().numpy().astype(np.float64)
    return values

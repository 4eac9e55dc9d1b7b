"""The models that a federation trains: one file a family, one registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fl_app.models.convnet import ConvNet
from fl_app.models.mlp import MLP
from fl_app.protocol import Knowledge

MODELS: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {
    "convnet": ConvNet,
    "mlp": MLP,
}


def create_model(
    name: str, num_classes: int, image_shape: tuple[int, int, int], seed: int | None = None
) -> nn.Module:
    """Return a freshly initialised model.

    Every model has `features(x)`, the activations before the classifier, of
    shape (batch, width), and `classifier`, the last layer, which takes them; it is
    called on normalised images (batch, C, H, W).

    Parameters
    ----------
    name : str
        A name in `MODELS`.
    num_classes : int
    image_shape : tuple of int
        (C, H, W).
    seed : int, optional
        Initialises deterministically without touching torch's global state.

    Raises
    ------
    ValueError
        If no model has this name, or it does not fit the image size.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
    if seed is None:
        return MODELS[name](num_classes, image_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](num_classes, image_shape)


def known_model(knowledge: Knowledge) -> nn.Module:
    """Return the model that a server knows its clients to train, with weights of its own.

    Raises
    ------
    ValueError
        See `create_model`.
    """
    return create_model(knowledge.model, knowledge.num_classes, knowledge.image_shape)

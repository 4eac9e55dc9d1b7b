"""The models that a federation trains: one file a family, one registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fl_app.models.convnet import ConvNet
from fl_app.models.extensions import extend
from fl_app.models.mlp import MLP
from fl_app.protocol import Knowledge

MODELS: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {
    "convnet": ConvNet,
    "mlp": MLP,
}


def create_model(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    seed: int | None = None,
    *,
    precode: int = 0,
    dropout: float = 0.0,
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
    precode, dropout : int, float
        See `extensions.extend`. With them `classifier` is a sequence that ends in
        the last layer.

    Raises
    ------
    ValueError
        If no model has this name, it does not fit the image size, or an
        extension's number is out of range.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = MODELS[name](num_classes, image_shape)
        extend(model, precode, dropout)
    return model


def known_model(knowledge: Knowledge) -> nn.Module:
    """Return the model that a server knows its clients to train, with weights of its own.

    Raises
    ------
    ValueError
        See `create_model`.
    """
    return create_model(
        knowledge.model,
        knowledge.num_classes,
        knowledge.image_shape,
        precode=knowledge.precode,
        dropout=knowledge.dropout,
    )

"""What the registry of models holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

CHANNEL_NORMS = ("batch", "group", "none")
TOKENS = "LayerNorm over each token is part of the architecture"


@dataclass(frozen=True)
class Family:
    """How a model is built.

    Attributes
    ----------
    build : callable
        ``(num_classes, image_shape, norm) -> nn.Module``, see `create_model` for what
        that must have: the number of classes, (C, H, W), and one of `norms`. A family with
        `heads` is called with ``head=``, one of these, too.
    norms : tuple of str
        What it can be normalised by, its default first.
    reason : str
        Why by nothing else.
    heads : tuple of str
        What it can have between its last feature maps and its classifier, the default
        first; empty: there is no choice.
    """

    build: Callable[..., nn.Module]
    norms: tuple[str, ...] = ("none",)
    reason: str = ""
    heads: tuple[str, ...] = ()


def check_sides(name: str, image_shape: tuple[int, int, int], divisor: int) -> None:
    """Raise ValueError unless a model's images, (C, H, W), have sides that a number divides."""
    if image_shape[1] % divisor or image_shape[2] % divisor:
        raise ValueError(
            f"{name} needs a height and width divisible by {divisor}, got {image_shape}"
        )

"""Normalisation layers: which, and in which mode BatchNorm runs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_GROUP = 16  # channels a group of GroupNorm, as Wu & He (2018) found best

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def channel_norm(norm: str, channels: int) -> nn.Module:
    """Return the normalisation of a convolution's output.

    Parameters
    ----------
    norm : {"batch", "group", "none"}
    channels : int
        A multiple of 16, the channels of a group.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // _GROUP, channels) if norm == "group" else nn.Identity()


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    """Yield a model's BatchNorm layers by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, BatchNorm):
            yield name, layer


def set_batch_norm(model: nn.Module, mode: str) -> None:
    """Put a model in training mode, and its BatchNorm layers in one of their own.

    Parameters
    ----------
    model : nn.Module
    mode : {"train", "eval"}
        Whether BatchNorm takes the mean and variance of the batch, and moves its
        running ones towards them, or takes the running ones.
    """
    model.train()
    for _, layer in batch_norms(model):
        layer.train(mode == "train")

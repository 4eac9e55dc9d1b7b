"""The priors that the project ships: weights in ``weights/``, a model card beside each."""

from __future__ import annotations

import torch
from torch import nn

from server_strategies.priors.flow import load_weights
from server_strategies.priors.places import shipped_weights


def compact(device: torch.device | str = "cpu") -> nn.Module:
    """Return the small network, for a CPU."""
    return load_weights(shipped_weights("compact"), device)


def unet64(device: torch.device | str = "cpu") -> nn.Module:
    """Return the paper's network, for a GPU: it denoises better, at nine times the work."""
    return load_weights(shipped_weights("unet64"), device)

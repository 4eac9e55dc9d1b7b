"""A multilayer perceptron, whose first layer gives a single image away in closed form."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.models.family import Family


class MLP(nn.Module):
    """Flatten, FC ->256, ReLU, FC ->classes; PyTorch's default initialisation.

    789,258 parameters for 10 classes of (3, 32, 32).

    Parameters
    ----------
    num_classes : int
    image_shape : tuple of int
        (C, H, W).
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(math.prod(image_shape), 256)
        self.classifier = nn.Linear(256, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the hidden activations, shape (batch, 256)."""
        return F.relu(self.fc1(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))


MLP_FAMILY = Family(
    lambda classes, shape, _: MLP(classes, shape), reason="a hidden unit is no channel"
)

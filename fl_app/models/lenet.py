"""LeNet-5 with ReLU, as small federations of digits train it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.models.family import Family, check_sides

_KERNEL = 5


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling; PyTorch's default initialisation.

    conv 5x5 C->6 (padding 2), ReLU, MaxPool 2, conv 5x5 6->16, ReLU, MaxPool 2, FC ->120,
    ReLU, FC ->84, ReLU, FC ->classes. 61,706 parameters for 10 classes of (1, 28, 28).

    Parameters
    ----------
    num_classes : int
    image_shape : tuple of int
        (C, H, W); H and W divisible by 4, and 12 or more.

    Raises
    ------
    ValueError
        If H or W does not fit.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        check_sides("lenet5", image_shape, 4)
        if min(height, width) < 2 * (_KERNEL + 1):
            raise ValueError(
                f"lenet5 takes sides of {2 * (_KERNEL + 1)} or more, got {image_shape}"
            )
        self.conv1 = nn.Conv2d(channels, 6, _KERNEL, padding=2)
        self.conv2 = nn.Conv2d(6, 16, _KERNEL)
        places = ((height // 2 - _KERNEL + 1) // 2) * ((width // 2 - _KERNEL + 1) // 2)
        self.fc1 = nn.Linear(16 * places, 120)
        self.fc2 = nn.Linear(120, 84)
        self.classifier = nn.Linear(84, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden activations, shape (batch, 84)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))


LENET5 = Family(
    lambda classes, shape, _: LeNet5(classes, shape), reason="it has no normalisation layer"
)
"""The model `lenet5`."""

"""The ConvNet of surrogate model extension (Zhu et al., 2023)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.models.family import Family, check_sides
from fl_app.models.norms import channel_norm


class ConvNet(nn.Module):
    """Two convolutions with average pooling, then two fully connected layers.

    conv 3x3 C->64, ReLU, AvgPool 2, conv 3x3 64->128, ReLU, AvgPool 2,
    FC ->200, ReLU, FC ->classes; PyTorch's default initialisation. Its
    authors use no normalisation layers; where there are, they follow the
    convolutions. 1,716,258 parameters for 10 classes of (3, 32, 32), without them.

    Parameters
    ----------
    num_classes, image_shape, norm
        See `Family`; H and W divisible by 4.

    Raises
    ------
    ValueError
        If H or W is not divisible by 4.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], norm: str = "none"
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        check_sides("convnet", image_shape, 4)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1)
        self.norm1 = channel_norm(norm, 64)
        self.conv2 = nn.Conv2d(64, 128, 3, padding=1)
        self.norm2 = channel_norm(norm, 128)
        self.fc1 = nn.Linear(128 * (height // 4) * (width // 4), 200)
        self.classifier = nn.Linear(200, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden activations, shape (batch, 200)."""
        x = F.avg_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.avg_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return F.relu(self.fc1(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))


CONVNET = Family(ConvNet, ("none", "batch", "group"))

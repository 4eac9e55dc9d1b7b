"""VGG-11 with a head for small images."""

from __future__ import annotations

from torch import Tensor, nn

from fl_app.models.family import CHANNEL_NORMS, Family, check_sides
from fl_app.models.norms import channel_norm

_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(nn.Module):
    """Configuration A of Simonyan & Zisserman (2015), with one linear layer as its head.

    Five stages of 3x3 convolutions with ReLU, each followed by MaxPool 2, then the
    mean over what is left of the image, and FC 512->classes, as is usual for CIFAR.
    Convolutions have a bias where nothing normalises it away; He's initialisation.
    9,228,362 parameters for 10 classes with BatchNorm.

    Parameters
    ----------
    num_classes, image_shape, norm
        See `Family`; H and W divisible by 32.

    Raises
    ------
    ValueError
        If H or W is not divisible by 32.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], norm: str = "batch"
    ) -> None:
        super().__init__()
        channels = image_shape[0]
        check_sides("vgg11", image_shape, 32)
        layers: list[nn.Module] = []
        for stage in _STAGES:
            for out in stage:
                layers += [
                    nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"),
                    channel_norm(norm, out),
                    nn.ReLU(),
                ]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, num_classes)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Return the mean of the last feature maps, shape (batch, 512)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))


VGG11_FAMILY = Family(VGG11, CHANNEL_NORMS)

"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module

from torch import Tensor, nn

from fl_app.models.family import CHANNEL_NORMS, Family, check_sides
from fl_app.models.norms import channel_norm
from fl_app.util.vision import import_torchvision

_HEADS = ("gap", "flatten", "mlp")
_HIDDEN = 1000  # width of the linear layer of `mlp`


class ResNet(nn.Module):
    """A residual network of basic blocks (He et al., 2016), for small images.

    A 3x3 stem of stride 1 without pooling, stages of torchvision's `BasicBlock`,
    each of twice the width of the one before and, after the first, half its
    image, then a head and a linear classifier.
    For 10 classes with BatchNorm: ResNet-18, blocks (2, 2, 2, 2) of width 64,
    11,173,962 parameters; ResNet-8, blocks (1, 1, 1) of width 16, 78,042.

    The head ``gap`` is the mean over the image, ``flatten`` all of its places, and ``mlp``
    that of SME's ResNet-8 (Zhu et al., 2023): the means over 2x2 places with a border of
    zeros, then a linear layer of 1,000 without an activation.

    He's initialisation. Without normalisation each of n blocks would double the
    activations' variance, so there the branches start with 1 / sqrt(n) of it.

    Parameters
    ----------
    num_classes, image_shape, norm
        See `Family`; H and W divisible by 8.
    blocks : sequence of int
        Of each stage.
    width : int
        Channels of the first stage.
    head : {"gap", "flatten", "mlp"}

    Raises
    ------
    ValueError
        If H or W is not divisible by 8.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        norm: str = "batch",
        *,
        blocks: Sequence[int],
        width: int,
        head: str = "gap",
    ) -> None:
        super().__init__()
        channels = image_shape[0]
        check_sides("a resnet", image_shape, 8)
        import_torchvision()  # here, as it takes a second and no other model needs it
        basic_block = import_module("torchvision.models.resnet").BasicBlock
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            channel_norm(norm, width),
            nn.ReLU(),
        ]
        before, normalised = width, partial(channel_norm, norm)
        for stage, count in enumerate(blocks):
            out = width * 2**stage
            for place in range(count):
                stride = 2 if stage and not place else 1
                shortcut = None
                if stride > 1:
                    project = nn.Conv2d(before, out, 1, stride, bias=False)
                    shortcut = nn.Sequential(project, normalised(out))
                layers.append(basic_block(before, out, stride, shortcut, norm_layer=normalised))
                before = out
        area = [side // 2 ** (len(blocks) - 1) for side in image_shape[1:]]
        if head == "gap":
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        elif head == "flatten":
            layers.append(nn.Flatten())
            before *= area[0] * area[1]
        else:
            pooled = before * (area[0] // 2 + 1) * (area[1] // 2 + 1)
            before = _HIDDEN
            layers += [nn.AvgPool2d(2, padding=1), nn.Flatten(), nn.Linear(pooled, before)]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if norm == "none":
            for layer in self.body.children():
                if isinstance(layer, basic_block):
                    layer.conv2.weight.data.div_(sum(blocks) ** 0.5)

    def features(self, x: Tensor) -> Tensor:
        """Return what the head makes of the last feature maps, shape (batch, width)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))


RESNET8 = Family(partial(ResNet, blocks=(1, 1, 1), width=16), CHANNEL_NORMS, heads=_HEADS)
RESNET8_WIDE = Family(
    partial(ResNet, blocks=(1, 1, 1), width=32), CHANNEL_NORMS, heads=("mlp", "gap", "flatten")
)
RESNET18 = Family(partial(ResNet, blocks=(2, 2, 2, 2), width=64), CHANNEL_NORMS, heads=_HEADS)

"""What the models on tokens have in common: an image cut into patches, a token for each."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from fl_app.models.family import check_sides

PATCH = 4  # pixels across


class PatchModel(nn.Module):
    """An image model on tokens: a convolution without overlap embeds each patch of 4x4.

    Parameters
    ----------
    name : str
        The model's, for the message.
    image_shape : tuple of int
        (C, H, W); H and W divisible by 4.
    width : int
        Of a token.

    Attributes
    ----------
    num_tokens : int
    classifier : nn.Linear
        Set by the subclass.

    Raises
    ------
    ValueError
        If H or W is not divisible by 4.
    """

    classifier: nn.Linear

    def __init__(self, name: str, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, rows, columns = image_shape
        check_sides(name, image_shape, PATCH)
        self.num_tokens = (rows // PATCH) * (columns // PATCH)
        self.patches = nn.Conv2d(channels, width, PATCH, stride=PATCH)

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens of images, shape (batch, num_tokens, width)."""
        return self.patches(x).flatten(2).transpose(1, 2)

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return the activations before the classifier, shape (batch, width)."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))

"""The MLP-Mixer, for small images."""

from __future__ import annotations

from torch import Tensor, nn

from fl_app.models.family import TOKENS, Family

PATCH = 4  # pixels across, of the models that cut an image into tokens
_WIDTH, _TOKENS_MLP, _CHANNELS_MLP, _BLOCKS = 128, 64, 512, 8


class MLPMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021): patches of 4, width 128, 8 blocks.

    Each block mixes over the tokens, then over the channels, by an MLP of one hidden
    layer with GELU: of 64 units and of 512, the half and four times the width as in
    the paper. The features are the mean over the tokens. 1,132,170 parameters for
    10 classes of (3, 32, 32).

    Parameters
    ----------
    num_classes : int
    image_shape : tuple of int
        (C, H, W); H and W divisible by 4.

    Raises
    ------
    ValueError
        If H or W is not divisible by 4.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        check_patches("mlp_mixer", image_shape)
        tokens = (height // PATCH) * (width // PATCH)
        self.patches = nn.Conv2d(channels, _WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*(_Block(tokens) for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.classifier = nn.Linear(_WIDTH, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the mean over the tokens, shape (batch, 128)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(tokens)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        return self.classifier(self.features(x))


class _Block(nn.Module):
    """Mix tokens (batch, tokens, width), first over the tokens, then over the width."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm1, self.over_tokens = nn.LayerNorm(_WIDTH), _mlp(tokens, _TOKENS_MLP)
        self.norm2, self.over_channels = nn.LayerNorm(_WIDTH), _mlp(_WIDTH, _CHANNELS_MLP)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def check_patches(name: str, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError if an image can't be cut into patches."""
    _, height, width = image_shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"{name} needs a height and width divisible by {PATCH}, got {image_shape}")


MLP_MIXER = Family(lambda classes, shape, _: MLPMixer(classes, shape), ("layer",), TOKENS)

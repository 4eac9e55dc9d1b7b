"""The MLP-Mixer, for small images."""

from __future__ import annotations

from torch import Tensor, nn

from fl_app.models.family import TOKENS, Family
from fl_app.models.patches import PatchModel

_WIDTH, _TOKENS_MLP, _CHANNELS_MLP, _BLOCKS = 128, 64, 512, 8


class MLPMixer(PatchModel):
    """MLP-Mixer (Tolstikhin et al., 2021): patches of 4, width 128, 8 blocks.

    Each block mixes over the tokens, then over the channels, by an MLP of one hidden
    layer with GELU: of 64 units and of 512, the half and four times the width as in
    the paper. The features are the mean over the tokens. 1,132,170 parameters for
    10 classes of (3, 32, 32).

    Parameters as in `Family.build`. H and W have to be divisible by 4, see `PatchModel`.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__("mlp_mixer", image_shape, _WIDTH)
        self.blocks = nn.Sequential(*(_Block(self.num_tokens) for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.classifier = nn.Linear(_WIDTH, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the mean over the tokens, shape (batch, 128)."""
        return self.norm(self.blocks(self.tokens(x))).mean(1)


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


MLP_MIXER = Family(lambda classes, shape, _: MLPMixer(classes, shape), ("layer",), TOKENS)

"""A small vision transformer, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fl_app.models.family import TOKENS, Family
from fl_app.models.patches import PatchModel

_WIDTH, _HEADS, _LAYERS = 192, 3, 12


class ViT(PatchModel):
    """ViT-tiny (Dosovitskiy et al., 2021; its size as in Touvron et al., 2021): patches of 4.

    Width 192, 3 heads, 12 layers with an MLP of 768 units and GELU, normalised
    before each; a class token and learned positions; no dropout. The layers are
    torch's own. 5,362,762 parameters for 10 classes of (3, 32, 32).

    Attention is computed by its formula: torch's fused kernels can't be
    differentiated twice, as an attack does.

    Parameters as in `Family.build`. H and W have to be divisible by 4, see `PatchModel`.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__("vit_tiny", image_shape, _WIDTH)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, _WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.num_tokens + 1, _WIDTH))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    _WIDTH,
                    _HEADS,
                    4 * _WIDTH,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(_LAYERS)
            )
        )
        self.norm = nn.LayerNorm(_WIDTH)
        self.classifier = nn.Linear(_WIDTH, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the class token at the end, shape (batch, 192)."""
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.tokens(x)], 1)
        with sdpa_kernel(SDPBackend.MATH):
            return self.norm(self.layers(tokens + self.positions)[:, 0])


VIT_TINY = Family(lambda classes, shape, _: ViT(classes, shape), ("layer",), TOKENS)

"""The image bank: drawn, written, and loaded in a client's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from server_strategies.priors.bank import SIZE, draw_bank, load_bank, write_bank
from server_strategies.priors.images import load_images


class Still(nn.Module):
    """A velocity of zero: images are their noise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_the_shipped_bank_has_natural_images_in_every_shape() -> None:
    images = load_bank((3, 32, 32))
    assert images.shape == (2000, 3, 32, 32)
    assert 0.15 < images.std() < 0.3
    assert load_bank((1, 28, 28)).shape == (2000, 1, 28, 28)
    rows = images[:50, :, 1:] - images[:50, :, :-1]
    assert rows.abs().mean() < 0.08  # neighbours are alike, so the tiles are in their places
    with pytest.raises(ValueError, match="1 or 3 channels"):
        load_bank((4, 32, 32))


def test_a_bank_is_seeded_and_written_as_a_mosaic(tmp_path: Path) -> None:
    counts: list[int] = []
    images = draw_bank(Still(), 100, steps=1, seed=3, tell=counts.append)
    assert torch.equal(images, draw_bank(Still(), 100, steps=1, seed=3))
    assert counts == [50, 100]
    write_bank(images, tmp_path / "bank.png")
    assert torch.equal(load_images(str(tmp_path), "mosaic", SIZE)[0], images)
    with pytest.raises(ValueError, match="rows of 50"):
        write_bank(images[:70], tmp_path / "bank.png")

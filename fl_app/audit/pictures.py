"""The pictures of a run; its table is in `fl_app.audit.table`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fl_app.audit.metrics import Leakage
from fl_app.util.files import whole_file

_TILE = 96  # pixels a tile has at least: 32 x 32 is too small to judge
_GAP = 12  # pixels between pairs; the two of a pair nearly touch
_LINE = 16  # pixels a line of the caption
_MAX_PAIRS = 64


def pair_notes(
    leakage: Leakage | None, true: Sequence[int], found: Sequence[int]
) -> list[tuple[str, str]]:
    """Return what stands below each pair of a picture: its place and score, and its class.

    Parameters
    ----------
    leakage : Leakage or None
        None: there is no truth.
    true, found : sequence of int
        Classes of the private images, where they are known, and of their reconstructions.
    """
    psnr = leakage.metrics["psnr"] if leakage else None
    identified = leakage.identification.identified if leakage and leakage.identification else ()
    notes = []
    for i, label in enumerate(found):
        score = f"image {i}"
        score += f": {psnr.values[i]:.1f} dB" if psnr else ""
        score += ", identified" if i < len(identified) and identified[i] else ""
        if i >= len(true):
            words = f"class {label} by the attack"
        else:
            words = f"class {true[i]}" + (f", taken for {label}" if true[i] != label else "")
        notes.append((score, words))
    return notes


def save_picture(
    path: Path,
    reconstructed: Tensor,
    private: Tensor | None,
    caption: Sequence[str],
    notes: Sequence[Sequence[str]] = (),
) -> None:
    """Write a PNG of pairs, private | reconstructed, enlarged without smoothing.

    Parameters
    ----------
    path : Path
        Written whole or not at all.
    reconstructed : Tensor, shape (N, C, H, W)
        In [0, 1], in the order of `private`; C is 1 or 3.
    private : Tensor, shape (N, C, H, W), or None
        None: there is no truth, and the reconstructions stand alone.
    caption : sequence of str
        Lines above the pairs.
    notes : sequence of sequence of str
        Lines below each pair, as many for each; see `pair_notes`.
    """
    shown = min(len(reconstructed), _MAX_PAIRS)
    lines = list(caption)
    lines.append("private | reconstructed" if private is not None else "reconstructed (no truth)")
    if shown < len(reconstructed):
        lines[-1] += f", the first {shown} of {len(reconstructed)}"

    sources = [reconstructed] if private is None else [private, reconstructed]
    scale = math.ceil(_TILE / min(reconstructed.shape[-2:]))
    tiles = [[_tile(images[i], scale) for images in sources] for i in range(shown)]
    width, height = tiles[0][0].size
    columns = math.ceil(math.sqrt(shown / len(sources)))
    rows = math.ceil(shown / columns)

    font = ImageFont.load_default(size=12)
    text_width = math.ceil(max(font.getlength(line) for line in lines))
    below = [font.getlength(words) for note in notes[:shown] for words in note]
    across = math.ceil(max([len(sources) * (width + 2) - 2, *below])) + _GAP
    down = height + _GAP + (_LINE * len(notes[0]) if notes else 0)
    top = _GAP + len(lines) * _LINE
    size = (max(columns * across, text_width + _GAP) + _GAP, top + rows * down + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + number * _LINE), line, fill="black", font=font)
    for i, pair in enumerate(tiles):
        row, column = divmod(i, columns)
        for j, tile in enumerate(pair):
            left = _GAP + column * across + j * (width + 2)
            canvas.paste(tile, (left, top + _GAP + row * down))
        for below_it, words in enumerate(notes[i] if notes else ()):
            y = top + _GAP + row * down + height + below_it * _LINE
            place = (_GAP + column * across, y)
            draw.text(place, words, fill="black", font=font)
    with whole_file(path) as temporary:
        canvas.save(temporary, format="PNG")


def save_grid(
    path: Path, columns: Mapping[str, Sequence[Tensor | None]], caption: Sequence[str]
) -> None:
    """Write a PNG of images in named columns, enlarged without smoothing.

    Parameters
    ----------
    path : Path
        Written whole or not at all.
    columns : mapping of str to sequence of (Tensor or None)
        By heading, of one line or several: images (C, H, W) in [0, 1], C 1 or 3, one a row, or
        None where there is none. As many in every column, and one image at least.
    caption : sequence of str
        Lines above the grid.
    """
    images = [image for column in columns.values() for image in column if image is not None]
    scale = math.ceil(_TILE / min(images[0].shape[-2:]))
    width, height = _tile(images[0], scale).size
    font = ImageFont.load_default(size=12)
    heads = [name.splitlines() for name in columns]
    step = _GAP + max(width, *(math.ceil(font.getlength(line)) for head in heads for line in head))
    head_lines = max(map(len, heads))
    top = _GAP + (len(caption) + head_lines) * _LINE
    rows = max(map(len, columns.values()))
    text_width = math.ceil(max((font.getlength(line) for line in caption), default=0))
    size = (
        max(len(columns) * step, text_width + _GAP) + _GAP,
        top + rows * (height + 2) + _GAP,
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(caption):
        draw.text((_GAP, _GAP + number * _LINE), line, fill="black", font=font)
    for number, (head, column) in enumerate(zip(heads, columns.values(), strict=True)):
        left = _GAP + number * step
        for above, words in enumerate(head, start=-head_lines):
            place = (left, top + above * _LINE)
            draw.text(place, words, fill="black", font=font)
        for row, image in enumerate(column):
            corner = (left, top + row * (height + 2))
            if image is None:
                draw.text(corner, "none", fill="grey", font=font)
            else:
                canvas.paste(_tile(image, scale), corner)
    with whole_file(path) as temporary:
        canvas.save(temporary, format="PNG")


def _tile(image: Tensor, scale: int) -> Image.Image:
    """Turn (C, H, W) in [0, 1] into an RGB image, `scale` times as large."""
    pixels = image.detach().cpu().float().expand(3, -1, -1).permute(1, 2, 0).numpy()
    tile = Image.fromarray(np.round(pixels * 255).clip(0, 255).astype(np.uint8))
    return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)

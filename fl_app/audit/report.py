"""What people look at: the pictures of a run and its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fl_app.util.files import whole_file
from fl_app.util.text import printable

_TILE = 96  # pixels a tile has at least: 32 x 32 is too small to judge
_GAP = 12  # pixels between pairs; the two of a pair nearly touch
_LINE = 16  # pixels a line of the caption
_MAX_PAIRS = 64


def save_picture(
    path: Path, reconstructed: Tensor, private: Tensor | None, caption: Sequence[str]
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
    pair_width = len(sources) * (width + 2) - 2
    columns = math.ceil(math.sqrt(shown / len(sources)))
    rows = math.ceil(shown / columns)

    font = ImageFont.load_default(size=12)
    text_width = math.ceil(max(font.getlength(line) for line in lines))
    top = _GAP + len(lines) * _LINE
    size = (
        max(columns * (pair_width + _GAP), text_width + _GAP) + _GAP,
        top + rows * (height + _GAP) + _GAP,
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + number * _LINE), line, fill="black", font=font)
    for i, pair in enumerate(tiles):
        row, column = divmod(i, columns)
        for j, tile in enumerate(pair):
            left = _GAP + column * (pair_width + _GAP) + j * (width + 2)
            canvas.paste(tile, (left, top + _GAP + row * (height + _GAP)))
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
        By heading: images (C, H, W) in [0, 1], C 1 or 3, one a row, or None where
        there is none. As many in every column, and one image at least.
    caption : sequence of str
        Lines above the grid.
    """
    images = [image for column in columns.values() for image in column if image is not None]
    scale = math.ceil(_TILE / min(images[0].shape[-2:]))
    width, height = _tile(images[0], scale).size
    font = ImageFont.load_default(size=12)
    step = _GAP + max(width, *(math.ceil(font.getlength(name)) for name in columns))
    top = _GAP + (len(caption) + 1) * _LINE
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
    for number, (name, column) in enumerate(columns.items()):
        left = _GAP + number * step
        draw.text((left, top - _LINE), name, fill="black", font=font)
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


def beats_grey(metrics: Mapping[str, Any]) -> bool:
    """Say whether a line's mean PSNR is above that of a grey image."""
    score = metrics["psnr"]
    return score["mean"] is not None and score["mean"] > score["baseline"]


def leakage_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a run from the lines of its log; it fits 80 columns.

    A reconstruction that is no better than a grey image is said to be so;
    failed attacks are red, with their error below the table, as is what the
    diagnosis of the others found, the scores of those without a truth, that a run
    holds private images, and the clients' defence.
    """
    table = Table(
        title="Leakage: mean over a client's images, PSNR with its 95% interval",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for name in ("Round", "Client"):
        table.add_column(name, justify="right")
    table.add_column("Attack", overflow="fold")
    table.add_column("PSNR dB", justify="right", no_wrap=True)
    for name in ("Grey dB", "SSIM", "LPIPS VGG", "LPIPS Alex", "Time s"):
        table.add_column(name, justify="right")
    table.add_column("Note")
    below = Text(justify="left")
    for line in lines:
        note, style = _note(line)
        metrics = line["metrics"]
        cells = [
            str(line["round"]),
            _client(line),
            line["attack"],
            _number(metrics, "psnr", "mean", 1) + _half_width(metrics.get("psnr")),
            _number(metrics, "psnr", "baseline", 1),
            *(_number(metrics, name, "mean", 3) for name in ("ssim", "lpips_vgg", "lpips_alex")),
            f"{line['seconds']:.1f}" if line["status"] == "ok" else "-",
            note,
        ]
        # Text, not str: a name may look like rich's markup.
        table.add_row(*(Text(printable(cell)) for cell in cells), style=style)
        who = f"client {_client(line)}" if line["client"] is not None else "client unknown"
        where = f"round {line['round']}, {who} (node {line['node']}), {line['attack']}"
        if line["status"] != "ok":
            error = printable(str(line["error"]))
            below.append(f"{where} {line['status']}: {error}\n", style=style)
            continue
        # Logs from before there was a diagnosis have none, nor have they these scores.
        if line.get("diagnosis"):
            words = printable("; ".join(line["diagnosis"]))
            below.append(f"{where}: {words}\n", style="yellow")
        if line.get("reference_free"):
            below.append(f"{where}, no truth: {_alone(line['reference_free'])}\n")
    if any(line.get("truth") for line in lines):
        below.append("With Truth: the clients' private batches were there to score with.\n")
    for words in dict.fromkeys(_defence(line) for line in lines):
        below.append(words)
    table.caption = below if below else None
    table.caption_style = "none"
    return table


def _client(line: Mapping[str, Any]) -> str:
    """Return whose update a line is about; logs from before there were sums have no clients."""
    if line.get("clients"):
        return f"sum of {len(line['clients'])}"
    return "-" if line["client"] is None else str(line["client"])


def _defence(line: Mapping[str, Any]) -> str:
    """Say what the client did against being seen; nothing where it did nothing."""
    if line.get("defense", "none") == "none":  # logs from before there were defences have none
        return ""
    known = "known" if line["defense_known"] else "unknown"
    return f"Defence: {line['defense']}, {known} to the attacker.\n"


def _note(line: Mapping[str, Any]) -> tuple[str, str]:
    """Return what to say of a line, and the style to say it in."""
    if line["status"] != "ok":
        return line["status"], "red" if line["status"] == "failed" else "yellow"
    labels = _labels(line)
    if line["metrics"].get("psnr") is None:
        return f"{line['reasons'].get('metrics', 'not scored')}; {labels}", ""
    if beats_grey(line["metrics"]):
        return labels, ""
    return f"no better than grey; {labels}", "dim"


def _alone(scores: Mapping[str, Any]) -> str:
    """Say the scores of a reconstruction that has no truth."""
    words = []
    if scores["matching_loss"] is not None:
        words.append(f"matching loss {scores['matching_loss']:.3g}")
    for name, what in (("tv", "TV"), ("prior_residual", "prior residual")):
        score = scores[name]
        if score and score["mean"] is not None:
            words.append(f"{what} {score['mean']:.3f} (noise {score['baseline']:.3f})")
    counts = ", ".join(f"{count} of {label}" for label, count in scores["label_counts"].items())
    return printable("; ".join([*words, f"labels: {counts}"]))


def _labels(line: Mapping[str, Any]) -> str:
    """Say where a line's labels come from, and how many recovered ones are right."""
    # Logs from before labels were recovered have no source: theirs were given.
    source = line.get("labels_source") or "given"
    if line.get("label_accuracy") is None or source == "given":
        return f"labels {source}"
    return f"labels {line['label_accuracy']:.0%}, chance {line['label_chance']:.0%}"


def _number(metrics: Mapping[str, Any], name: str, field: str, digits: int) -> str:
    value = (metrics.get(name) or {}).get(field)
    return "-" if value is None else f"{value:.{digits}f}"


def _half_width(score: Mapping[str, Any] | None) -> str:
    if score is None or score["low"] is None or score["high"] is None:
        return ""
    return f" ±{(score['high'] - score['low']) / 2:.1f}"

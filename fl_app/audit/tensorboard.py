"""The log in TensorBoard, by round: a function of lines, see `fl_app.audit.on_line`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fl_app.audit.exposure import identified_of, mean_single_colour
from fl_app.util.files import private_folder


def write(line: Mapping[str, Any]) -> None:
    """Write a line's scores, their baselines and its picture to ``tensorboard/`` in the run.

    Steps are rounds. Tags are the score, whose it is, and the client: ``psnr/sme/client 0`` beside
    ``psnr/mean colour/client 0`` and ``psnr/single colour/client 0`` (dB),
    ``identified/sme/client 0`` beside ``identified/chance/client 0`` (shares),
    ``matching_loss/sme/client 0``, ``pictures/sme/client 0``.

    Parameters
    ----------
    line : mapping
        As the hook gets it.
    """
    if line["status"] != "ok":
        return
    writer, round_ = _writer(line["folder"]), line["round"]
    who = "sum" if line["clients"] else f"client {line['client']}"
    for tag, value in _scalars(line):
        writer.add_scalar(f"{tag}/{who}", value, round_)
    if line["picture"]:
        with Image.open(Path(line["folder"], line["picture"])) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        writer.add_image(f"pictures/{line['attack']}/{who}", pixels, round_, dataformats="HWC")
    writer.flush()  # whoever looks now sees it, and so does a run that is killed


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what a line has, by the tag without its client."""
    attack, psnr = line["attack"], line["metrics"].get("psnr") or {}
    found = identified_of([line])
    values = {
        f"psnr/{attack}": psnr.get("mean"),
        "psnr/mean colour": psnr.get("baseline"),
        "psnr/single colour": mean_single_colour([line]),
        f"identified/{attack}": found and found["count"] / found["of"],
        "identified/chance": found and found["chance"],
        f"matching_loss/{attack}": next(iter(line["losses"][-1:]), None),
    }
    yield from ((tag, value) for tag, value in values.items() if value is not None)


@cache
def _writer(folder: str) -> SummaryWriter:
    """Return the one writer of a run's folder; it shows private images."""
    where = Path(folder, "tensorboard")
    private_folder(where)
    return SummaryWriter(str(where))

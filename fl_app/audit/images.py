"""The log by image: what its lines say of each private image, one row an image. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageRow:
    """What one attack made of one image of one update.

    Attributes
    ----------
    image : int
        Its place in training order, from 0; without a truth that of the reconstruction.
    true_label, found_label : int or None
        Class indices: the image's own, and that of its reconstruction.
    psnr, single_colour : float or None
        In dB; of the reconstruction, and of the image's own mean colour.
    ssim, lpips_vgg, lpips_alex, mse, fmse, tv : float or None
        See `fl_app.audit.metrics`.
    prior_residual : float or None
        See `fl_app.audit.reference_free`; only without a truth, as `tv` then.
    determined : float or None
        Share of the image's directions that its exact features determine.
    recognisable : bool or None
        Whether the SSIM is above `fl_app.audit.exposure.RECOGNISABLE`.
    identified : bool or None
        Whether it is the nearest to its reconstruction, see `fl_app.audit.identification`.
    rank, candidates : int or None
        Its place among so many other images of its class and itself, 1 is the nearest.
    """

    image: int
    true_label: int | None = None
    found_label: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips_vgg: float | None = None
    lpips_alex: float | None = None
    mse: float | None = None
    fmse: float | None = None
    tv: float | None = None
    prior_residual: float | None = None
    single_colour: float | None = None
    determined: float | None = None
    recognisable: bool | None = None
    identified: bool | None = None
    rank: int | None = None
    candidates: int | None = None


_METRICS = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "mse", "fmse", "tv", "prior_residual")
_AS_LOGGED = ("single_colour", "determined", "recognisable")


def image_rows(line: Mapping[str, Any]) -> list[ImageRow]:
    """Return a line's images; none where its attack did not succeed.

    Parameters
    ----------
    line : mapping
        Of the log, as `read_lines` gives it; what its lists lack is None.
    """
    if line["status"] != "ok":
        return []
    scores = line["metrics"] or line["reference_free"]
    columns: dict[str, Sequence[Any]] = {
        name: (scores.get(name) or {}).get("values") or () for name in _METRICS
    }
    columns |= {name: line[name] or () for name in _AS_LOGGED}
    columns |= {"true_label": line["true_labels"] or (), "found_label": line["found_labels"]}
    found = line["identification"] or {}
    columns |= {name: found.get(name, ()) for name in ("identified", "rank", "candidates")}
    count = max(map(len, columns.values()))
    return [
        ImageRow(i, **{name: _at(values, i) for name, values in columns.items()})
        for i in range(count)
    ]


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None

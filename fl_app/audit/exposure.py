"""Who is exposed: what is said of some images' scores beside their mean. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypedDict

from fl_app.util.intervals import COSINE, DISTANCE, SHARE, UNBOUNDED, Bounds

MAX_PSNR = 100.0  # dB, given to an exact copy: infinity would swallow every mean

RECOGNISABLE = 0.5
"""SSIM over which a reconstruction is recognisable as its private image.

Structure that is not the image's own seldom gets there, and structure that people see does. On
the images that ship with the project fewer than 3% of the pairs of different images of a class
are above it, though they are parts of one photograph, while more than half of the images with
noise of 20 dB are; a test holds both. The mean colour's own share, larger where images are
plain, stands beside it as chance.
"""

BOUNDS: Mapping[str, Bounds] = {
    "psnr": (0.0, MAX_PSNR),  # an MSE of pixels in [0, 1] is at most 1
    "ssim": COSINE,
    "label_accuracy": SHARE,
    **dict.fromkeys(("lpips_vgg", "lpips_alex", "mse", "fmse", "tv", "prior_residual"), DISTANCE),
}
"""What each metric can be at least and at most."""

FEW_ITERATIONS = 30
"""Iterations of a search from noise below which little of any image shows."""

_MORE_LEAKS = ("psnr", "ssim")
_LESS_LEAKS = ("lpips_vgg", "lpips_alex", "mse", "fmse")


class Summary(TypedDict):
    """What is said of a metric's values, one an image, beside their mean."""

    median: float | None
    worst_tenth: float | None


def bounds_of(metric: str) -> Bounds:
    """Return what a metric can be at least and at most."""
    return BOUNDS.get(metric, UNBOUNDED)


def summary_of(metric: str, values: Sequence[float]) -> Summary:
    """Return the median of some images' values, and the worst tenth.

    The worst tenth is the auditor's worst case: the mean over the ``ceil(n / 10)`` images
    that leak most by this metric, those of the highest PSNR or SSIM, of the lowest LPIPS or
    MSE. None for a metric that says nothing of the private image.

    Parameters
    ----------
    metric : str
    values : sequence of float
        In any order; of none there is neither.
    """
    if not values:
        return Summary(median=None, worst_tenth=None)
    worst = None
    if metric in (*_MORE_LEAKS, *_LESS_LEAKS):
        count = math.ceil(len(values) / 10)
        first = sorted(values, reverse=metric in _MORE_LEAKS)[:count]
        worst = math.fsum(first) / count
    return Summary(median=median(values), worst_tenth=worst)


def summary_over(metric: str, scores: Iterable[Mapping[str, Any] | None]) -> Summary:
    """Return `summary_of` the images of some scores, of those that hold values by image."""
    found = (value for score in scores if score for value in score.get("values", ()))
    return summary_of(metric, [value for value in found if value is not None])


def verdict(mean: float, mean_colour: float | None, single_colour: float | None) -> str:
    """Say that a mean PSNR in dB shows no reconstruction; nothing where it does.

    Parameters
    ----------
    mean : float
    mean_colour : float or None
        Of the mean-colour baseline on the same images.
    single_colour : float or None
        Of each image's own mean colour, the best that an image of one colour can have.
    """
    if mean_colour is not None and mean <= mean_colour:
        return "no better than the mean colour"
    if single_colour is not None and mean <= single_colour:
        return "no structure"
    return ""


def mean_single_colour(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean of ``single_colour``, PSNR in dB, over the images of lines that have it."""
    found = (value for line in lines for value in line.get("single_colour", ()))
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known else None


class Recognised(TypedDict):
    """How many images are recognisable, see `RECOGNISABLE`.

    Attributes
    ----------
    count, of : int
    chance : float
        Share of the images that the mean-colour baseline is recognisable as.
    """

    count: int
    of: int
    chance: float


def recognised_of(lines: Iterable[Mapping[str, Any]]) -> Recognised | None:
    """Count the recognisable images of lines that say it; None where none does."""
    known = [line for line in lines if line.get("recognisable")]
    if not known:
        return None
    images = sum(len(line["recognisable"]) for line in known)
    by_chance = math.fsum(
        len(line["recognisable"]) * (line["recognisable_chance"] or 0) for line in known
    )
    count = sum(sum(line["recognisable"]) for line in known)
    return Recognised(count=count, of=images, chance=by_chance / images)


class Identified(TypedDict):
    """How many images are identified, see `fl_app.audit.identification`.

    Attributes
    ----------
    count, of : int
        Those identified, and those that have candidates.
    candidates : tuple of int
        Other images that each was compared with: the fewest and the most.
    chance : float
        Share of the images that a guess would identify.
    by : str
        What the distance is of.
    """

    count: int
    of: int
    candidates: tuple[int, int]
    chance: float
    by: str


def identified_of(lines: Iterable[Mapping[str, Any]]) -> Identified | None:
    """Count the identified images of some lines, each with what `Identification` holds or None.

    Returns
    -------
    Identified or None
        None where no image has candidates.
    """
    known = [each for line in lines if (each := line.get("identification"))]
    pairs = [
        (identified, candidates)
        for each in known
        for identified, candidates in zip(each["identified"], each["candidates"], strict=True)
        if identified is not None
    ]
    if not pairs:
        return None
    numbers = [candidates for _, candidates in pairs]
    return Identified(
        count=sum(identified for identified, _ in pairs),
        of=len(pairs),
        candidates=(min(numbers), max(numbers)),
        chance=math.fsum(1 / (1 + number) for number in numbers) / len(numbers),
        by=" or ".join(dict.fromkeys(each["by"] for each in known)),
    )


def count_words(found: Mapping[str, Any] | None) -> str:
    """Return ``k of n``; a dash where it could not be had."""
    return f"{found['count']} of {found['of']}" if found else "-"


def chance_words(found: Mapping[str, Any]) -> str:
    """Say what identified images are the nearest of, and how often a guess is right."""
    low, high = (1 + number for number in found["candidates"])
    number = str(low) if low == high else f"{low} to {high}"
    return f"nearest of {number} of the class by {found['by']}, chance {found['chance']:.1%}"


def hardly_searched(line: Mapping[str, Any]) -> str:
    """Return that an attack's time held too few iterations to show its images, or "".

    Exact features need few.

    Parameters
    ----------
    line : mapping
        Of the leakage log.
    """
    few = line["status"] == "ok" and (line["iterations"] or 0) < FEW_ITERATIONS
    if not few or line["stop_reason"] != "seconds" or line["determined"]:
        return ""
    return (
        f"the {line['seconds']:.0f} seconds of {line['attack']} held {line['iterations']} "
        f"iterations on {line['num_examples']} images: take them as not tried"
    )

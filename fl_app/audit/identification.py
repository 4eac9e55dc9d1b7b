"""Image identifiability: whether a reconstruction tells its private image from others like it.

Yin et al., "See through Gradients: Image Batch Recovery via GradInversion", 2021: a private image
is identified if, of itself and the other images of its class in the data set, it is the nearest
to the reconstruction that is assigned to it. A reconstruction that shows a cat, and no more,
identifies none of the cats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_app.audit.perceptual import Lpips

MOST, FEWEST = 500, 50
"""Candidates of a class at most; and of images so large that `_PIXELS` allows less."""
_PIXELS = 2**20  # of a class's candidates together: 500 of 45 x 45, 256 of 64 x 64

Likeness = Callable[[Tensor], Sequence[Tensor]]
"""Features of images (N, C, H, W) in [0, 1]: tensors (N, ...), of which `distances` is made."""


def most_candidates(image_shape: Sequence[int]) -> int:
    """Return how many candidates of a class are drawn, so that it takes a second at most.

    Parameters
    ----------
    image_shape : sequence of int
        (C, H, W).
    """
    height, width = image_shape[-2:]
    return min(MOST, max(FEWEST, _PIXELS // (height * width)))


@dataclass(frozen=True)
class Identification:
    """Which private images are identified; in training order.

    Attributes
    ----------
    identified : tuple of (bool or None)
        Whether the private image is the nearest; None where its class has no other image.
    rank : tuple of (int or None)
        Its place among the candidates by distance, 1 is the nearest; one as far away
        as another comes last.
    candidates : tuple of int
        Other images of its class that it is told from. A guess is right once in
        ``1 + candidates``.
    by : str
        What the distance is of.
    """

    identified: tuple[bool | None, ...]
    rank: tuple[int | None, ...]
    candidates: tuple[int, ...]
    by: str


@dataclass(frozen=True)
class Identifier:
    """Identifies private images by their reconstructions.

    Attributes
    ----------
    draw : callable
        ``draw(label)`` returns the candidates of a class: uint8 images (M, C, H, W) of the
        data set, the private image among them or not; the same ones on every call.
    likeness : Likeness
    by : str
        Names it.
    """

    draw: Callable[[int], Tensor]
    likeness: Likeness
    by: str

    def __call__(
        self, reconstructed: Tensor, private: Tensor, labels: Sequence[int]
    ) -> Identification:
        """Return which private images are identified.

        The features of a class's candidates are computed once for all its images.

        Parameters
        ----------
        reconstructed, private : Tensor, shape (N, C, H, W)
            In [0, 1]; the i-th reconstruction is assigned to the i-th private image.
        labels : sequence of int
            Of the private images.

        Raises
        ------
        ValueError
            If no image has a candidate, or the candidates are of another shape.
        """
        ranks: dict[int, int] = {}
        counts = [0] * len(labels)
        for label in dict.fromkeys(labels):
            candidates = self.draw(label)
            if not len(candidates):
                continue
            if candidates.shape[1:] != private.shape[1:]:
                raise ValueError(
                    f"the data set's images are {tuple(candidates.shape[1:])}, the private ones "
                    f"{tuple(private.shape[1:])}"
                )
            features = self.likeness(candidates.float() / 255)
            for i in (i for i, own in enumerate(labels) if own == label):
                others = _others(candidates, private[i])
                counts[i] = int(others.sum())
                if counts[i]:
                    ours = self.likeness(torch.stack([reconstructed[i], private[i]]))
                    ranks[i] = _rank(ours, [each[others] for each in features])
        if not ranks:
            raise ValueError("no private image has another image of its class in the data set")
        rank = tuple(ranks.get(i) for i in range(len(labels)))
        identified = tuple(None if place is None else place == 1 for place in rank)
        return Identification(identified, rank, tuple(counts), self.by)


Identify = Callable[[Tensor, Tensor, Sequence[int]], Identification]
"""Takes what an `Identifier` does, and may say by a ValueError or OSError why it can't tell."""


def nothing_to_tell_from(*_: object) -> Identification:
    """Refuse: there are no other images to tell the private ones from."""
    raise ValueError("no data set to tell the private images from")


def choose_likeness(
    lpips: object, features: Callable[[Tensor], Tensor] | None, image_shape: Sequence[int]
) -> tuple[Likeness, str]:
    """Return what likeness is judged by, and its name.

    LPIPS-Alex as in the paper. Where it is not there, the target model's features and the
    pixels: the sum of both squared distances, each divided by its mean over the candidates,
    so that neither outweighs the other.

    Parameters
    ----------
    lpips : Lpips or None
        What `load_lpips` returned for AlexNet.
    features : callable or None
        See `fl_app.audit.metrics.target_features`.
    image_shape : sequence of int
        (C, H, W): LPIPS takes no image of 30 x 30 or less.

    Raises
    ------
    ValueError
        If there is neither.
    """
    if isinstance(lpips, Lpips) and lpips.takes(image_shape):
        return lambda images: (lpips.features(images),), "LPIPS-Alex"
    if features is None:
        raise ValueError("neither LPIPS-Alex nor the target model's features are there")

    @torch.no_grad()
    def both(images: Tensor) -> Sequence[Tensor]:
        return features(images), images

    return both, "the target model's features and pixels"


def distances(image: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the distance of an image to M others, ``sum_k |a_k - b_k|^2 / mean``.

    Parameters
    ----------
    image, others : sequence of Tensor
        Of each kind k of features: one of shape (...), and one of shape (M, ...). The mean
        is that of a kind's squared distances over the M; a kind whose are all 0 says
        nothing.

    Returns
    -------
    Tensor, shape (M,)
    """
    total = torch.zeros(len(others[0]), dtype=torch.float64)
    for one, many in zip(image, others, strict=True):
        squared = (many - one).flatten(1).square().sum(1, dtype=torch.float64)
        mean = squared.mean()
        total += squared / mean if mean > 0 else 0
    return total


def _rank(ours: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    """Return the private image's place: `ours` are features of the reconstruction and of it."""
    found = [each[0] for each in ours]
    away = distances(
        found, [torch.cat([one[1:], many]) for one, many in zip(ours, others, strict=True)]
    )
    return 1 + int((away[1:] <= away[0]).sum())


def _others(candidates: Tensor, private: Tensor) -> Tensor:
    """Say which candidates are not the private image, byte for byte."""
    own = (255 * private).round().to(torch.uint8)
    return (candidates != own).flatten(1).any(1)

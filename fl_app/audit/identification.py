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

# Candidates of a class: so many that chance is low, so few that a client of 20 images takes
# seconds. The target model's features cost more than AlexNet's, and a large image more still.
MOST, MOST_BY_MODEL, FEWEST = 500, 200, 50
_PIXELS = 2**20  # of a class's candidates together, if they are more than the fewest
_CHUNK = 32  # images at once: beyond it takes more time an image, and more memory


@dataclass(frozen=True)
class Likeness:
    """What the likeness of two images is judged by.

    Attributes
    ----------
    features : callable
        Maps images (N, C, H, W) in [0, 1] to one or more tensors (N, ...), of which
        `distances` is made.
    by : str
        Names it.
    most : int
        Candidates of a class that it is worth at most.
    """

    features: Callable[[Tensor], Sequence[Tensor]]
    by: str
    most: int


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
        Other images of its class that it is compared with. A guess is right once in
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
        ``draw(label, count)`` returns the candidates of a class: so many uint8 images
        (M, C, H, W) of the data set, or all if fewer, the private one among them or not.
    likeness : Likeness
    """

    draw: Callable[[int, int], Tensor]
    likeness: Likeness

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
            candidates = self.draw(label, self.likeness.most)
            if not len(candidates):
                continue
            if candidates.shape[1:] != private.shape[1:]:
                raise ValueError(
                    f"the data set's images are {tuple(candidates.shape[1:])}, the private ones "
                    f"{tuple(private.shape[1:])}"
                )
            features = self._features(candidates.float() / 255)
            for i in (i for i, own in enumerate(labels) if own == label):
                others = _others(candidates, private[i])
                counts[i] = int(others.sum())
                if counts[i]:
                    ours = self._features(torch.stack([reconstructed[i], private[i]]))
                    ranks[i] = _rank(ours, [each[others] for each in features])
        if not ranks:
            raise ValueError("no private image has another image of its class in the data set")
        rank = tuple(ranks.get(i) for i in range(len(labels)))
        identified = tuple(None if place is None else place == 1 for place in rank)
        return Identification(identified, rank, tuple(counts), self.likeness.by)

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        parts = (self.likeness.features(chunk) for chunk in images.split(_CHUNK))
        return [torch.cat(kind) for kind in zip(*parts, strict=True)]


Identify = Callable[[Tensor, Tensor, Sequence[int]], Identification]
"""Takes what an `Identifier` does, and may say by a ValueError or OSError why it can't tell."""


def nothing_to_tell_from(*_: object) -> Identification:
    """Refuse: there are no other images to compare the private ones with."""
    raise ValueError("no data set to compare the private images with")


def choose_likeness(
    lpips: object, features: Callable[[Tensor], Tensor] | None, image_shape: Sequence[int]
) -> Likeness:
    """Return what the likeness to a private image is judged by.

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
    allowed = max(FEWEST, _PIXELS // (image_shape[-2] * image_shape[-1]))
    if isinstance(lpips, Lpips) and lpips.takes(image_shape):
        return Likeness(lambda images: (lpips.features(images),), "LPIPS-Alex", min(MOST, allowed))
    if features is None:
        raise ValueError("neither LPIPS-Alex nor the target model's features are there")
    return Likeness(
        lambda images: (features(images), images),
        "the target model's features and pixels",
        min(MOST_BY_MODEL, allowed),
    )


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

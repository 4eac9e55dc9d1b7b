"""Baselines without the update: images that an attack has to beat for its score to matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fl_app.config import DatasetConfig
from fl_app.data import draw_images
from server_strategies.priors.flow import fit, unfit
from server_strategies.priors.training import sample

MEAN_COLOUR, TRAINING, PRIOR = "mean colour", "random training image", "prior alone"

_STEPS = 50  # of a sample from the prior, as in the grids that its training draws


def baseline_images(
    private: Tensor,
    mean: Sequence[float],
    dataset: DatasetConfig | None,
    network: nn.Module | None,
    seed: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return guesses of a client's N images that do not use its update.

    Parameters
    ----------
    private : Tensor, shape (N, C, H, W)
        In [0, 1]; only its shape is read, and which images not to draw.
    mean : sequence of float
        The data set's mean colour in [0, 1].
    dataset : DatasetConfig or None
        Its train split is drawn from; None: it is not there.
    network : nn.Module or None
        The velocity network of a flow prior; None: there is none.
    seed : sequence of int
        All >= 0; decides the draws.

    Returns
    -------
    images : dict of str to Tensor, shape (N, C, H, W)
        In [0, 1]. `MEAN_COLOUR`: one colour; `TRAINING`: images of the train split,
        none of which is one of `private`; `PRIOR`: samples of the flow prior.
    reasons : dict of str to str
        Why a baseline is missing.
    """
    images = {MEAN_COLOUR: torch.tensor(mean).view(-1, 1, 1).expand(private.shape)}
    reasons = {}
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    try:
        images[TRAINING] = _training_images(private, dataset, number)
    except (ValueError, OSError) as error:
        reasons[TRAINING] = str(error)
    try:
        images[PRIOR] = _prior_images(private, network, number)
    except ValueError as error:
        reasons[PRIOR] = str(error)
    return images, reasons


def _training_images(private: Tensor, dataset: DatasetConfig | None, seed: int) -> Tensor:
    if dataset is None:
        raise ValueError("the data set is not there")
    count = len(private)
    known = {_bytes(image) for image in (255 * private).round().to(torch.uint8)}
    drawn = draw_images(dataset, "train", 2 * count, seed).images
    others = [image for image in drawn if _bytes(image) not in known][:count]
    if len(others) < count:
        raise ValueError(f"the train split has no {count} images beside the client's own")
    return torch.stack(others).float() / 255


def _prior_images(private: Tensor, network: nn.Module | None, seed: int) -> Tensor:
    if network is None:
        raise ValueError("no prior could be loaded")
    count, channels, height, width = private.shape
    if height != width:
        raise ValueError(f"images are {height} x {width}; the prior is sampled in squares")
    side = fit(private[:1], int(network.multiple)).shape[-1]  # type: ignore[arg-type]
    drawn = sample(network, count, _STEPS, torch.Generator().manual_seed(seed), side).float()
    return unfit(drawn, channels, height, width)


def _bytes(image: Tensor) -> bytes:
    return image.numpy().tobytes()

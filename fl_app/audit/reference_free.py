"""Scores of a reconstruction that need no Truth, for the auditor of a deployment.

None of them measures how much leaked. They show whether a reconstruction matches the
update and looks like an image. Whether it is the client's image only a Truth shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fl_app.audit.metrics import MetricScore, total_variation
from fl_app.protocol import Reconstruction
from server_strategies.priors.flow import FlowPrior

FLOW_TIME = 0.8  # t of the residual: the noise hides details and leaves the image's content


def reference_free(reconstruction: Reconstruction, network: nn.Module | None) -> dict[str, Any]:
    """Score a reconstruction by itself.

    Parameters
    ----------
    reconstruction : Reconstruction
        Images in [0, 1], shape (N, C, H, W).
    network : nn.Module or None
        A velocity network from `load_flow`; None: no prior residual.

    Returns
    -------
    dict
        ``matching_loss``: the last one, as the attack's objective defines it;
        ``tv``: `total_variation`, and ``prior_residual``:
        ``mean|x - D(t x + (1 - t) e, t)|^2`` on pixels in [-1, 1] with t = 0.8 and
        one fixed noise e, each a `MetricScore` whose baseline is that of uniform
        noise; ``label_counts``: images of each label, by label. Missing scores are
        None.
    """
    images = reconstruction.images.detach().cpu().float().clamp(0, 1)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {
        "matching_loss": reconstruction.losses[-1] if reconstruction.losses else None,
        "tv": _scored(
            "tv",
            total_variation(images, images).tolist(),
            float(total_variation(noise, noise).mean()),
        ),
        "prior_residual": None,
        "label_counts": {
            str(label): reconstruction.labels.count(label)
            for label in sorted(set(reconstruction.labels))
        },
    }
    if network is not None and images.shape[1] in (1, 3):
        residuals = [_residual(network, image[None]) for image in images]
        found["prior_residual"] = _scored(
            "prior_residual", residuals, _residual(network, noise[:1])
        )
    return found


def _scored(metric: str, values: list[float], baseline: float) -> MetricScore | None:
    if not all(map(math.isfinite, values)):
        return None
    return MetricScore.of(metric, values, baseline)


def _residual(network: nn.Module, image: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    return float(FlowPrior(network, 1.0, "denoiser", FLOW_TIME, FLOW_TIME, generator)(image, 0.0))

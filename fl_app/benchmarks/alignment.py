"""The benchmark `flowleak bench alignment`: whether a model's loss leads a search to the images.

An attack descends a matching loss. The ground truth has a loss of zero, but that helps only
where the descent points there. This measures it at images that are off by a known amount. It
needs the ground truth, so it is no part of any attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from client_app.training import normalise
from fl_app.audit.truth import Truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.models import SUITE as MODELS
from fl_app.benchmarks.rows import Row
from fl_app.benchmarks.suite import ReadingSuite
from fl_app.protocol import Knowledge, Observation
from fl_app.util.intervals import COSINE, mean_interval, with_interval
from server_strategies.attacks.matching import matching_objective
from server_strategies.attacks.matching.base import MatchingObjective

NOISES = {"20 dB": 0.1, "32 dB": 0.025}
"""PSNR of the images, and the standard deviation of the noise on pixels in [0, 1] that makes it."""

START = "noise"  # N(0, I) on normalised pixels, where an attack starts


def alignment(objective: MatchingObjective, x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the matching loss of images, and the cosine of its descent and the ground truth.

    ``cos(-dL/dx, truth - x)`` by image, then the mean over images. 1: the first step leads
    straight there; 0: no more so than a random direction, whose cosine has a standard
    deviation of ``1 / sqrt(C H W)``.

    Parameters
    ----------
    objective : MatchingObjective
    x, truth : Tensor, shape (N, C, H, W)
        Normalised images.
    """
    x = x.detach().requires_grad_()
    loss = objective(x, 0.0)
    (slope,) = torch.autograd.grad(loss, x)
    wanted = (truth - x).detach()
    cosines = torch.cosine_similarity(-slope.flatten(1), wanted.flatten(1))
    return loss.item(), cosines.mean().item()


class _Alignment(ReadingSuite):
    def read(self, observation: Observation, knowledge: Knowledge, truth: Truth) -> list[Row]:
        """Return one row a start: loss, alignment and its chance, as flow_matching sees them."""
        objective = matching_objective(
            "auto", observation, knowledge, distance="auto", relu_smoothing=None
        )
        private = normalise(truth.images, knowledge.mean, knowledge.std)
        std = torch.tensor(knowledge.std).view(-1, 1, 1)
        generator = torch.Generator().manual_seed(observation.node)
        noise = torch.randn(private.shape, generator=generator)
        starts = {START: noise}
        starts |= {name: private + size * noise / std for name, size in NOISES.items()}
        chance = private[0].numel() ** -0.5
        rows: list[Row] = []
        for name, x in starts.items():
            loss, cosine = alignment(objective, x, private)
            rows.append({"start": name, "loss": loss, "alignment": cosine, "chance": chance})
        return rows

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """Return a line a client: means over trials, 95% intervals."""
        starts = (START, *NOISES)
        head = ["client", "trials", *(f"alignment at {start}" for start in starts), "chance"]
        lines = [[*head, *(f"loss at {start}" for start in starts)]]
        for client in dict.fromkeys(row["client"] for row in rows):
            kept = [[r for r in rows if r["client"] == client and r["start"] == s] for s in starts]
            cosines = [with_interval([row["alignment"] for row in r], 3, COSINE) for r in kept]
            losses = [f"{mean_interval([row['loss'] for row in r])[0]:.3f}" for r in kept]
            chance = f"± {kept[0][0]['chance']:.3f}"
            lines.append([client, str(len(kept[0])), *cosines, chance, *losses])
        return lines


def _clients() -> tuple[Case, ...]:
    """Return the clients with SGD of `models`, once each; those with BatchNorm by group, too."""
    clients = {case.client: case for case in MODELS.cases if case.training.optimizer == "sgd"}
    for case in list(clients.values()):
        if case.training.batch_norm == "eval":
            other = replace(case, norm="group", training=replace(case.training, batch_norm="train"))
            clients[other.client] = other
    return tuple(clients.values())


SUITE = _Alignment(
    _clients(), "cosine of the matching loss's descent and the ground truth, 95% interval"
)
"""Whether a model's matching loss leads a search to the images.

No attack is run: with 4 trials, less than 10 minutes of one thread.
"""

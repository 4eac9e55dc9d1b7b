"""Truth: a client's private batches, left by the client for the auditor alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fl_app.util.files import whole_file


@dataclass(frozen=True)
class Truth:
    """What a client actually trained on in one round.

    Attributes
    ----------
    images : Tensor, shape (N, C, H, W)
        In [0, 1], in the order of the first pass.
    labels : tuple of int
        N class indices.
    batches : tuple of tuple of int
        For each local step the indices of its images in [0, N).
    round, node : int
        As in the Observation of the same client and round.
    """

    images: Tensor
    labels: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    round: int
    node: int


def joined(truths: Sequence[Truth]) -> Truth:
    """Return the Truth of a sum over clients, one after another: see `Observation`.

    Local step k is local step k of every client; its node is 0.

    Parameters
    ----------
    truths : sequence of Truth
        One a client, at least one, all of one round.
    """
    starts = accumulate((len(truth.labels) for truth in truths), initial=0)
    numbered = [
        [tuple(start + i for i in batch) for batch in truth.batches]
        for start, truth in zip(starts, truths, strict=False)
    ]
    return Truth(
        images=torch.cat([truth.images for truth in truths]),
        labels=tuple(label for truth in truths for label in truth.labels),
        batches=tuple(sum(step, ()) for step in zip_longest(*numbered, fillvalue=())),
        round=truths[0].round,
        node=0,
    )


def truth_path(folder: Path, round_: int, node: int) -> Path:
    """Return where the Truth of a client and round lies in a run's folder."""
    return folder / "truth" / f"round-{round_:04d}-node-{node}.safetensors"


def write_truth(folder: Path, truth: Truth) -> None:
    """Leave a Truth in the auditor's run folder, whole or not at all."""
    path = truth_path(folder, truth.round, truth.node)
    facts = {"batches": json.dumps(truth.batches)}
    tensors = {"images": truth.images.contiguous(), "labels": torch.tensor(truth.labels)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=facts)


def read_truth(folder: Path, round_: int, node: int) -> Truth | None:
    """Return the Truth of a client and round, None where the client left none."""
    path = truth_path(folder, round_, node)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
        batches = json.loads(file.metadata()["batches"])
    return Truth(
        images=images,
        labels=tuple(labels.tolist()),
        batches=tuple(tuple(batch) for batch in batches),
        round=round_,
        node=node,
    )

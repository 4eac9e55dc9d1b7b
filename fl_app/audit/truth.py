"""Truth: a client's private batches, left by the client for the auditor alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path

import torch
from torch import Tensor

from fl_app.protocol import Knowledge, LocalTraining
from fl_app.util.reading import BrokenFileError, parse_json
from fl_app.util.tensors import read_tensors, write_tensors


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


def has_truth(folder: Path, round_: int, node: int) -> bool:
    """Say whether there is anything in a Truth's place."""
    return os.path.lexists(truth_path(folder, round_, node))


def write_truth(folder: Path, truth: Truth) -> None:
    """Leave a Truth in the auditor's run folder, whole or not at all.

    Raises
    ------
    OSError
        If it can't be written.
    """
    path = truth_path(folder, truth.round, truth.node)
    facts = {"batches": json.dumps(truth.batches)}
    tensors = {"images": truth.images.contiguous(), "labels": torch.tensor(truth.labels)}
    write_tensors(path, tensors, facts)


def read_truth(folder: Path, round_: int, node: int) -> Truth | None:
    """Return the Truth of a client and round, None where the client left none.

    Raises
    ------
    BrokenFileError
        If it can't be read, or is no truth: what trains on what, of images in [0, 1].
    """
    if not has_truth(folder, round_, node):
        return None
    path = truth_path(folder, round_, node)
    tensors, metadata = read_tensors(path)
    try:
        images, labels = tensors.get("images"), tensors.get("labels")
        if images is None or labels is None:
            raise ValueError("it lacks images or labels")
        batches = parse_json(metadata.get("batches", ""), Sequence[Sequence[int]])
        _check(images, labels, batches)
    except (ValueError, RuntimeError) as error:  # torch lacks functions for some types
        raise BrokenFileError(f"{path} is no truth: {error}") from error
    return Truth(
        images=images,
        labels=tuple(labels.tolist()),
        batches=tuple(tuple(batch) for batch in batches),
        round=round_,
        node=node,
    )


def _check(images: Tensor, labels: Tensor, batches: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for what no client trained on."""
    count = len(images) if images.dim() == 4 else 0
    if not count or not images.is_floating_point():
        raise ValueError(
            f"its images are {images.dtype} of shape {tuple(images.shape)}; allowed: "
            "numbers with a point, of shape (N, C, H, W), N 1 or more"
        )
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise ValueError("its pixels are not all in [0, 1]")
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(
            f"its labels are {labels.dtype} of shape {tuple(labels.shape)}; allowed: "
            f"int64 of shape ({count},)"
        )
    used = {i for batch in batches for i in batch}
    if used != set(range(count)) or not all(batches):
        raise ValueError(f"its batches are not of its {count} images, each used")


def check_truth(
    truth: Truth, knowledge: Knowledge, client: LocalTraining, num_examples: int
) -> None:
    """Refuse a Truth that can't be of an update.

    Parameters
    ----------
    truth : Truth
    knowledge : Knowledge
        What the server knows of the client.
    client : LocalTraining
        How it trains.
    num_examples : int
        Of the update.

    Raises
    ------
    ValueError
        If its images or labels are of other data, images are not in [0, 1], there are not as
        many as the client reported, or its batches are more or larger than the protocol's.
    """
    shape, classes = tuple(truth.images.shape[1:]), knowledge.num_classes
    if shape != knowledge.image_shape:
        raise ValueError(f"its images are {shape}; allowed, as in the run: {knowledge.image_shape}")
    low, high = min(truth.labels), max(truth.labels)
    if not 0 <= low <= high < classes:
        raise ValueError(f"its labels are from {low} to {high}; allowed: 0 to {classes - 1}")
    if len(truth.labels) != num_examples:
        raise ValueError(f"it holds {len(truth.labels)} images; the client reported {num_examples}")
    least, most = float(truth.images.min()), float(truth.images.max())
    if not (least >= 0 and most <= 1):  # NaN is neither
        raise ValueError(f"its images are from {least:g} to {most:g}; allowed: 0 to 1")
    steps, largest = len(client.batches(num_examples)), max(map(len, truth.batches))
    if len(truth.batches) > steps or largest > client.batch_size:
        raise ValueError(
            f"it has {len(truth.batches)} batches of up to {largest} images; allowed, as in the "
            f"run: {steps} of {client.batch_size}"
        )

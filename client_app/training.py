"""A client's local training: plain functions of tensors, without Flower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client_app.defended_steps import defended_steps
from fl_app.data import ImageSet
from fl_app.models.extensions import local_loss
from fl_app.models.norms import set_batch_norm
from fl_app.protocol import Defense, LocalTraining
from fl_app.protocol.optimizer import create_optimizer

NO_DEFENSE = Defense()
_EVALUATION_BATCH = 256  # only bounds the memory


def local_seed(seed: int, partition: int, round_: int) -> int:
    """Return a seed for one client and round; neighbours give unrelated seeds.

    Parameters
    ----------
    seed : int
        The run's, >= 0.
    partition, round_ : int
        >= 0.
    """
    return int(np.random.SeedSequence([seed, partition, round_]).generate_state(1)[0])


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(images - mean) / std``, channel by channel.

    Parameters
    ----------
    images : Tensor, shape (..., C, H, W)
        uint8 in 0..255, or any float type in [0, 1], which is kept.
    mean, std : sequence of float
        C values for images in [0, 1].
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return (images - _per_channel(mean, images)) / _per_channel(std, images)


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)


def choose_batches(
    num_local: int, training: LocalTraining, generator: torch.Generator
) -> list[Tensor]:
    """Draw the images of each local step, as a shuffling DataLoader does.

    The client's data are shuffled again for each pass and split into batches of B. The
    last batch of a pass may be smaller, or is left out (`LocalTraining.drop_last`).

    Parameters
    ----------
    num_local : int
        Images that the client holds, >= 1.
    training : LocalTraining
        K local steps, or whole epochs.
    generator : torch.Generator
        On the CPU; decides the order.

    Returns
    -------
    list of Tensor
        For each local step the int64 indices of its images in [0, num_local).

    Raises
    ------
    ValueError
        If the client holds no image, or no full batch where others are left out.
    """
    if num_local < 1:
        raise ValueError("the client holds no image; fewer clients or another partitioner help")
    steps_a_pass = training.steps_a_pass(num_local)
    batches: list[Tensor] = []
    passes = 0
    order = torch.randperm(num_local, generator=generator)
    while len(batches) < training.local_steps or (
        not training.local_steps and passes < training.local_epochs
    ):
        if passes and training.reshuffle:
            order = torch.randperm(num_local, generator=generator)
        batches += order.split(training.batch_size)[:steps_a_pass]
        passes += 1
    return batches[: training.local_steps or None]


def in_training_order(batches: Sequence[Tensor]) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """Renumber the images that were trained on by their first use.

    Parameters
    ----------
    batches : sequence of Tensor
        For each local step indices into the client's data.

    Returns
    -------
    order : Tensor, shape (N,)
        The distinct indices, by first use.
    renumbered : tuple of tuple of int
        `batches` with each index replaced by its position in `order`.
    """
    order = list(dict.fromkeys(torch.cat(list(batches)).tolist()))
    position = {index: i for i, index in enumerate(order)}
    renumbered = tuple(tuple(position[i] for i in batch.tolist()) for batch in batches)
    return torch.tensor(order), renumbered


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    training: LocalTraining,
    mean: Sequence[float],
    std: Sequence[float],
    defense: Defense = NO_DEFENSE,
) -> float:
    """Train `model` in place with its `local_loss`, as `LocalTraining` says.

    One optimiser step a batch, or for every `LocalTraining.accumulate` of them. At the end
    the remainder makes a step too.

    Parameters
    ----------
    model : nn.Module
        In the images' float type and on their device; left in training mode, with
        the running statistics it had where `training` sends none. Parameters that
        `training` leaves out no longer require a gradient.
    images : Tensor, shape (N, C, H, W)
        In [0, 1].
    labels : Tensor of int64, shape (N,)
    batches : sequence of Tensor
        For each local step indices in [0, N).
    training : LocalTraining
        The optimiser and its settings, the loss, and BatchNorm's mode.
    mean, std : sequence of float
        Per-channel normalisation.
    defense : Defense
        Its steps within local training, see `defended_steps`.

    Returns
    -------
    float
        The mean `local_loss` over the batches, each before its update.

    Raises
    ------
    ValueError
        See `create_optimizer` and `local_loss`.
    """
    weights = dict(model.named_parameters())
    plain = create_optimizer(weights, training)
    for name, weight in weights.items():
        if not training.trains(name):
            weight.requires_grad_(False)
    sent = {name: w.detach().clone() for name, w in weights.items() if training.proximal}
    set_batch_norm(model, training.batch_norm)
    received = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = []
    with defended_steps(model, plain, defense) as (forward, optimizer):
        optimizer.zero_grad()
        for number, batch in enumerate(batches, start=1):
            logits = forward(normalise(images[batch], mean, std))
            loss = local_loss(model, logits, labels[batch], training)
            (loss / training.accumulate).backward()
            losses.append(float(loss.detach()))
            for name, before in sent.items():  # FedProx
                weight = weights[name]
                if weight.grad is not None:
                    share = training.proximal / training.accumulate
                    weight.grad.add_(weight.detach() - before, alpha=share)
            if number % training.accumulate and number < len(batches):
                continue
            if training.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    if not training.send_buffers:
        model.load_state_dict(received, strict=False)
    return sum(losses) / len(losses)


def check_training(training: LocalTraining, model: nn.Module, num_classes: int) -> None:
    """Refuse a training that does not fit a model.

    Raises
    ------
    ValueError
        With the setting, its value, and what is allowed instead.
    """
    create_optimizer(dict(model.named_parameters()), training)
    if len(training.class_weights) not in (0, num_classes):
        raise ValueError(
            f"class_weights has {len(training.class_weights)} numbers; allowed: {num_classes}, "
            "one a class"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, image_set: ImageSet, mean: Sequence[float], std: Sequence[float]
) -> tuple[float, float]:
    """Return a model's mean cross-entropy and its accuracy in [0, 1].

    Parameters
    ----------
    model : nn.Module
        Left in evaluation mode.
    image_set : ImageSet
        At least one image; moved to the model's device batch by batch.
    mean, std : sequence of float
        Per-channel normalisation.

    Raises
    ------
    ValueError
        If there is no image.
    """
    if not len(image_set.labels):
        raise ValueError("no image to evaluate on")
    model.eval()
    device = next(model.parameters()).device
    loss, right = 0.0, 0
    batches = zip(
        image_set.images.split(_EVALUATION_BATCH),
        image_set.labels.split(_EVALUATION_BATCH),
        strict=True,
    )
    with torch.random.fork_rng():  # PRECODE samples here too: the same in every evaluation
        torch.manual_seed(0)
        for images, labels in batches:
            labels = labels.to(device)
            logits = model(normalise(images.to(device), mean, std))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
    return loss / len(image_set.labels), right / len(image_set.labels)

"""What every matching objective has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fl_app.models.extensions import Bottleneck, MaskDropout, random_layers
from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.distance import CosineDistance, Distance

OF_A_GRADIENT = (
    "loss", "label_smoothing", "class_weights", "drop_last", "trainable", "proximal",
)  # fmt: skip
"""Settings of `LocalTraining` that a client's gradient at w0 has; FedProx's term is zero there."""

EVERY_SETTING = tuple(each.name for each in fields(LocalTraining))


@dataclass(frozen=True)
class Unknown:
    """A quantity that an attack optimises jointly with the images, such as a surrogate's alpha.

    Attributes
    ----------
    value : Tensor
        Requires a gradient.
    lr : float
        Peak learning rate.
    low, high : float
        It is boxed to these.
    prior : callable, optional
        Penalty, shape (), of its value.
    """

    value: Tensor
    lr: float
    low: float = 0.0
    high: float = 1.0
    prior: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Setting:
    """What a matching objective is made from.

    Attributes
    ----------
    model : nn.Module
        As `clients_model` returns it, on the device to work on; its parameters are
        not read.
    observation : Observation
    knowledge : Knowledge
        With the client's training. Labels in training order; None: their
        probabilities are optimised jointly with the images, from equal ones.
    reason : str
        Why this objective was chosen.
    distance : type of Distance
        What updates are compared by, where the objective has no distance of its own.
    """

    model: nn.Module
    observation: Observation
    knowledge: Knowledge
    reason: str
    distance: type[Distance] = CosineDistance


def channel_scale(knowledge: Knowledge, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the client's mean and standard deviation on a device, shape (C, 1, 1) each."""
    mean, std = (torch.tensor(v, device=device) for v in (knowledge.mean, knowledge.std))
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


class MatchingObjective(ABC):
    """How far the update that candidate images cause is from the observed one.

    Called on candidate images, and differentiable in them.

    Parameters
    ----------
    setting : Setting

    Raises
    ------
    ValueError
        If the client's training is beyond what the objective models.

    Attributes
    ----------
    name : str
    models : tuple of str
        Settings of `LocalTraining` that it models beyond plain SGD, Adam and AdamW.
    measure : type of Distance
        What updates are compared by.
    used : int
        Images that some local step trains on: the first ones.
    relu_smoothing : float
        Width of the surrogate gradient for ReLU's second derivative, see `smooth_relu`;
        0: none.
    unknowns : list of Unknown
    noise : list of Unknown or None
        By random layer of the model, its draws for every image of every local step, in
        their order. None: the attacker does not know that the layer is a defence, and
        samples it in every call.
    masks : list of Unknown
        Those of `noise` that are masks of dropout.
    start : Tensor, shape (candidates * N, C, H, W), or None
        Normalised images to start from, where they are known in closed form.
    near_start : bool
        Whether `start` is nearly a solution, so that small steps lead there.
    candidates : int
        Candidates of each image that are optimised jointly, such as those of several
        restarts. The first candidates of all images come before the second ones.
    restart : float
        Share of the attack's iterations after which another loss is matched: the
        optimiser's moments and the learning rates start over. 0: nowhere.
    """

    name: str
    models: tuple[str, ...] = ("drop_last",)
    measure: type[Distance] = CosineDistance
    relu_smoothing = 0.0
    restart = 0.0
    near_start = True
    candidates = 1

    def __init__(self, setting: Setting) -> None:
        model, observation, knowledge = setting.model, setting.observation, setting.knowledge
        self.model, self.knowledge, self.reason = model, knowledge, setting.reason
        self.measure = setting.distance
        self.training = knowledge.client
        beyond = self.training.beyond(*self.models)
        if beyond:
            raise ValueError(
                f"matching is {self.name!r}, which does not know the client's training: {beyond}; "
                "allowed for it: auto, trajectory, passes"
            )
        self.batches = self.training.batches(observation.num_examples)
        self.used = len({image for batch in self.batches for image in batch})
        like = next(model.parameters())
        names = [name for name, _ in model.named_parameters()]
        self.w0 = {n: observation.w0[n].to(like).detach() for n in names}
        self.w1 = {n: observation.w1[n].to(like).detach() for n in names}
        self.unknowns: list[Unknown] = []
        self.start: Tensor | None = None
        self.noise = self._unknown_noise()
        self.unknowns += [unknown for unknown in self.noise if unknown]
        layers = zip(self.noise, random_layers(model), strict=True)
        self.masks = [noise for noise, layer in layers if noise and isinstance(layer, MaskDropout)]
        if knowledge.labels is not None:
            self.labels = torch.tensor(knowledge.labels, device=like.device)
            return
        shape = (observation.num_examples, knowledge.num_classes)
        self.labels = torch.full(shape, 0.5).to(like).requires_grad_()
        self.unknowns.append(Unknown(self.labels, lr=0.05))

    def _unknown_noise(self) -> list[Unknown | None]:
        rows, like = sum(len(batch) for batch in self.batches), next(iter(self.w0.values()))
        found: list[Unknown | None] = []
        for layer in random_layers(self.model):
            defense = self.knowledge.defense
            # Values of N(0, 1) lie further from their start than masks in [0, 1].
            precode = isinstance(layer, Bottleneck)
            known, lr = (defense.precode, 0.2) if precode else (defense.dropout, 0.05)
            own = isinstance(layer, MaskDropout) and layer.own
            start = like.new_full((rows, layer.size), layer.mean).requires_grad_()
            found.append(Unknown(start, lr, layer.low, layer.high) if known or own else None)
        return found

    def noise_of(self, first: int, x: Tensor) -> list[Tensor]:
        """Return the noise of each random layer for a batch, shape (B, size) each.

        Parameters
        ----------
        first : int
            Number of images in the local steps before it.
        x : Tensor, shape (B, C, H, W)
        """
        return [
            unknown.value[first : first + len(x)] if unknown else layer.draw(x)
            for unknown, layer in zip(self.noise, random_layers(self.model), strict=True)
        ]

    def targets(self) -> Tensor:
        """Return the images' classes, shape (N,), or their probabilities, (N, num_classes)."""
        if not self.labels.requires_grad:
            return self.labels
        return self.labels / self.labels.sum(1, keepdim=True).clamp_min(1e-6)

    def found_labels(self) -> tuple[int, ...]:
        """Return the N labels, or the most likely ones of the fitted probabilities."""
        labels = self.labels.argmax(1) if self.labels.requires_grad else self.labels
        return tuple(labels.tolist())

    def found_images(self, x: Tensor) -> Tensor:
        """Return the images, (N, C, H, W), that candidates (candidates * N, C, H, W) stand for."""
        return x

    def position(self) -> float | None:
        """Return where between w0 and w1 a surrogate takes its gradient; None: no surrogate."""
        return None

    def at_truth(self, noise: float) -> float:
        """Return the loss at the ground truth, by the share of noise in the update's square."""
        return self.measure.at_truth(noise)

    def reassignments(self) -> list[tuple[int, int]]:
        """Return the pairs of images that the search may have assigned to each other's local step.

        Swapped with their labels, they match the update nearly as well, and no small step
        undoes the swap.
        """
        return []

    def pace(self) -> Tensor | None:
        """Return by image the factor of the attack's steps, shape (candidates * N,).

        None: 1 for all.
        """
        return None

    @abstractmethod
    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the matching loss, shape ().

        Parameters
        ----------
        x : Tensor, shape (candidates * N, C, H, W)
            Normalised images.
        progress : float
            Share of the attack's iterations done, in [0, 1].
        """
        ...

"""What the server knows because it runs the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fl_app.protocol.defense import Defense
from fl_app.protocol.training import LocalTraining

LABEL_LEVELS = ("by-step", "counts", "unknown")
"""What an attack may be given of a client's labels: which label in which local step; how many
of each class, as the published attacks assume (iDLG, GradInversion, SME); nothing."""


def model_name(model: Any) -> str:
    """Return what a model is called: a registry's name, or ``module:name`` of a user's own."""
    if isinstance(model, str):
        return model
    while isinstance(model, partial):
        model = model.func
    kind = model if hasattr(model, "__qualname__") else type(model)
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass(frozen=True)
class DatasetInfo:
    """The facts of a data set that every side of the protocol knows.

    Attributes
    ----------
    num_classes : int
        Labels are 0 to ``num_classes - 1``.
    image_shape : tuple of int
        (C, H, W) of every image.
    mean, std : tuple of float
        Per channel, over the train split's pixels in [0, 1]; they normalise a model's input.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Knowledge:
    """What the server knows because it runs the protocol; an attack may read nothing else.

    Attributes
    ----------
    model : str, callable or nn.Module
        A name in `fl_app.models`, or a user's own model, see `Client`.
    num_classes : int
    image_shape : tuple of int
        (C, H, W) of a client's image.
    mean, std : tuple of float
        Per-channel normalisation of images in [0, 1].
    training : LocalTraining or None
        None: unknown, an attack has to guess it.
    labels : tuple of int or None
        The client's N labels: granted by the auditor, or inferred by an attack; None:
        neither. They are in training order at `labels_level` ``by-step``, or as far as an
        attack found it.
    labels_level : {"by-step", "counts", "unknown"}
        What was granted of the labels, see `LABEL_LEVELS` and `granting`.
    labels_source : str
        "given", or how an attack inferred the labels or their order.
    inferred : tuple of str
        What an attack inferred from the update itself, and how, in words.
    defense : Defense
        What the attacker knows of the client's defence; none, where it does not know.
    norm : str
        By what the model's activations are normalised, see `create_model`; "": by
        what its family is by default.
    head : str
        What is between the model's last feature maps and its classifier, see
        `create_model`; "": what its family has by default.
    precode, dropout : int, float
        The model's own, see `Defense`. Who sends a model knows its layers; that
        they are a defence, to be attacked, is what `defense` says.
    """

    model: Any
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    training: LocalTraining | None
    labels: tuple[int, ...] | None = None
    labels_level: str = "unknown"
    labels_source: str = "given"
    inferred: tuple[str, ...] = ()
    defense: Defense = field(default_factory=Defense)
    norm: str = ""
    head: str = ""
    precode: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.labels_level not in LABEL_LEVELS:
            raise ValueError(
                f"labels_level is {self.labels_level!r}; allowed: {', '.join(LABEL_LEVELS)}"
            )
        if self.labels is None and self.labels_level != "unknown":
            raise ValueError(f"labels_level is {self.labels_level!r}, but there are no labels")
        if self.labels is not None and (self.labels_level, self.labels_source) == (
            "unknown", "given",
        ):  # fmt: skip
            raise ValueError(
                "labels are given, but labels_level is 'unknown'; allowed: by-step, counts, see "
                "`granting`"
            )

    def granting(self, level: str, labels: tuple[int, ...] | None = None) -> Knowledge:
        """Return this knowledge with the client's labels granted at a level, and no higher.

        Parameters
        ----------
        level : {"by-step", "counts", "unknown"}
        labels : tuple of int, optional
            The client's N labels in training order; by default those of this knowledge.
            At ``counts`` they are sorted: nothing of their order is left.
        """
        labels = self.labels if labels is None else labels
        if level == "unknown" or labels is None:
            labels = None
        elif level == "counts":
            labels = tuple(sorted(labels))
        return replace(self, labels=labels, labels_level=level, labels_source="given")

    @property
    def model_name(self) -> str:
        """What the model is called: a registry's name, or ``module:name`` of a user's own."""
        return model_name(self.model)

    @property
    def client(self) -> LocalTraining:
        """How the client trains.

        Raises
        ------
        ValueError
            If that is unknown, see `training`.
        """
        if self.training is None:
            raise ValueError("the client's training is unknown; guess it first")
        return self.training

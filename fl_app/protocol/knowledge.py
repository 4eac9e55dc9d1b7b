"""What the server knows because it runs the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_app.protocol.defense import Defense
from fl_app.protocol.training import LocalTraining


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
    model : str
        A name in `fl_app.models`.
    num_classes : int
    image_shape : tuple of int
        (C, H, W) of a client's image.
    mean, std : tuple of float
        Per-channel normalisation of images in [0, 1].
    training : LocalTraining or None
        None: unknown, an attack has to guess it.
    labels : tuple of int or None
        The client's N labels in training order, where the auditor grants them
        (as SME assumes) or an attack recovered them; None: unknown.
    labels_source : str
        "given", or how an attack recovered them.
    inferred : tuple of str
        What an attack inferred from the update itself, and how, in words.
    defense : Defense
        What the attacker knows of the client's defence; none, where it does not know.
    norm : str
        By what the model's activations are normalised, see `create_model`; "": by
        what its family is by default.
    precode, dropout : int, float
        The model's own, see `Defense`. Who sends a model knows its layers; that
        they are a defence, to be attacked, is what `defense` says.
    """

    model: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    training: LocalTraining | None
    labels: tuple[int, ...] | None = None
    labels_source: str = "given"
    inferred: tuple[str, ...] = ()
    defense: Defense = field(default_factory=Defense)
    norm: str = ""
    precode: int = 0
    dropout: float = 0.0

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

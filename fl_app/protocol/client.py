"""Client: a user's description of the clients of a federation, from which an audit starts."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fl_app.protocol.defense import Defense
from fl_app.protocol.knowledge import Knowledge
from fl_app.protocol.training import LocalTraining

_NEEDED = ("optimizer", "lr", "batch_size")
_COUNTED = ("local_steps", "local_epochs")


@dataclass(frozen=True, init=False)
class Client:
    """What a server knows of its clients because it runs the protocol.

    Parameters
    ----------
    model : callable, nn.Module or str
        What every client trains: a class or a function that returns the module, called without
        arguments; a module, which is copied; ``module:factory``, which is imported at once; or
        a name of `flowleak.models.MODELS`. Its weights are replaced by those that the server
        sent, as far as it sent them; the others are the module's own.
    num_classes : int
        2 or more.
    image_shape : tuple of int
        (C, H, W) of an image as the model takes it.
    mean, std : float or sequence of float
        How images in [0, 1] are normalised, ``(x - mean) / std``: one number, or one a channel.
    epochs, steps : int
        Passes over a client's images a round, or local steps (optimiser steps) a round: one of
        the two.
    defense : Defense, optional
        What clients do so that less is seen, see `Defense`; default: nothing.
    examples_key : str
        Where a reply says how many images its client trained on.
    examples : int
        Images of every client; 0: as its reply says.
    **training
        The fields of `LocalTraining`. ``optimizer``, ``lr`` and ``batch_size`` are needed:
        nothing is assumed silently.

    Attributes
    ----------
    training : LocalTraining

    Raises
    ------
    ValueError
        If something is missing, unknown or out of range; the message says what is allowed.

    Examples
    --------
    >>> from flowleak import Client
    >>> client = Client(
    ...     model="lenet5", num_classes=10, image_shape=(3, 32, 32), mean=0.5, std=0.5,
    ...     optimizer="sgd", lr=0.1, momentum=0.9, batch_size=32, epochs=1,
    ... )
    >>> client.training.local_epochs
    1
    """

    model: Any
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    training: LocalTraining
    defense: Defense = field(default_factory=Defense)
    examples_key: str = "num-examples"
    examples: int = 0

    def __init__(
        self,
        *,
        model: Any,
        num_classes: int,
        image_shape: Sequence[int],
        mean: float | Sequence[float],
        std: float | Sequence[float],
        epochs: int = 0,
        steps: int = 0,
        defense: Defense | None = None,
        examples_key: str = "num-examples",
        examples: int = 0,
        **training: Any,
    ) -> None:
        shape = tuple(image_shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"image_shape is {shape}; allowed: (C, H, W)")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; allowed: 2 or more")
        if examples < 0:
            raise ValueError(f"examples is {examples}; allowed: 0 (as replies say) or more")
        values = {
            "model": _resolved(model),
            "num_classes": num_classes,
            "image_shape": shape,
            "mean": _by_channel("mean", mean, shape[0]),
            "std": _by_channel("std", std, shape[0]),
            "training": _training(training, epochs, steps),
            "defense": defense or Defense(),
            "examples_key": examples_key,
            "examples": examples,
        }
        if min(values["std"]) <= 0:
            raise ValueError(f"std is {std}; allowed: more than 0")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def knowledge(self) -> Knowledge:
        """What an attack may know of every client: no labels."""
        return Knowledge(
            model=self.model,
            num_classes=self.num_classes,
            image_shape=self.image_shape,
            mean=self.mean,
            std=self.std,
            training=self.training,
            defense=self.defense.plain(),
            precode=self.defense.precode,
            dropout=self.defense.dropout,
        )


def _training(settings: dict[str, Any], epochs: int, steps: int) -> LocalTraining:
    names = [each.name for each in dataclasses.fields(LocalTraining) if each.name not in _COUNTED]
    for name in settings:
        if name in _COUNTED:
            raise ValueError(f"{name} is set; allowed: {name.removeprefix('local_')}")
        if name not in names:
            raise ValueError(f"{name!r} is no setting of a client; allowed: {', '.join(names)}")
    missing = [name for name in _NEEDED if name not in settings]
    if missing:
        raise ValueError(f"{missing[0]} is missing: a client can't be simulated without")
    if (epochs > 0) == (steps > 0) or min(epochs, steps) < 0:
        raise ValueError(
            f"epochs is {epochs} and steps is {steps}; allowed: one of them, 1 or more"
        )
    return LocalTraining(**settings, local_steps=steps, local_epochs=epochs or 1)


def _by_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = (value,) * channels if isinstance(value, int | float) else tuple(value)
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} values; allowed: one, or {channels}")
    return tuple(float(each) for each in values)


def _resolved(model: Any) -> Any:
    """Return what a model's description stands for; ``module:factory`` is imported."""
    if isinstance(model, str) and ":" in model:
        module, _, attribute = model.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model is {model!r}, which can't be imported: {error}") from error
        model = found
    if not isinstance(model, str | Callable):  # type: ignore[arg-type]
        raise ValueError(
            f"model is {model!r}; allowed: a class or function that returns a module, a module, "
            "module:factory, or a model's name"
        )
    return model

"""How a client trains locally."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Loss = str | Callable[[Tensor, Tensor], Tensor]
    Option = float | bool | tuple[float, ...]
    Options = tuple[tuple[str, Option], ...]
else:
    # OmegaConf reads these at run time, and knows no such unions.
    Loss = Options = Any

OPTIMIZERS = (
    "adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "nadam", "radam", "adamax", "asgd",
)  # fmt: skip
"""Those of `torch.optim` that step from gradients alone, by a rule with a derivative. Rprop uses
only signs, so that its step has no derivative anywhere; LBFGS evaluates the loss again; Adafactor,
Muon and SparseAdam have no `differentiable` mode."""

LOSSES = ("cross_entropy", "mse", "bce")

_Each = TypeVar("_Each")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with settings of their own, as a `param_group` of `torch.optim`.

    Attributes
    ----------
    pattern : str
        Of their names, as in `fnmatch`: ``"*.bias"``.
    lr : float or None
        Learning rate, > 0; None: the training's.
    weight_decay : float or None
        >= 0; None: the training's.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr of {self.pattern!r} is {self.lr}; allowed: more than 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(
                f"weight_decay of {self.pattern!r} is {self.weight_decay}; allowed: 0 or more"
            )


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains locally: agreed by the protocol, so the server knows it.

    Attributes
    ----------
    optimizer : str
        One of `OPTIMIZERS`, as in `torch.optim`; its state is reset in every round.
    lr : float
        Learning rate, > 0.
    momentum : float
        Momentum of SGD in [0, 1); RMSprop's is one of `optimizer_options`.
    nesterov : bool
        Nesterov's momentum, SGD only.
    weight_decay : float
        >= 0; decoupled for adamw, added to the gradient otherwise.
    max_grad_norm : float
        Before each step a longer gradient is scaled down to this L2 norm over
        all parameters, as `torch.nn.utils.clip_grad_norm_` does; 0: never.
    batch_size : int
        Images a local step, B.
    local_steps : int
        Local steps a round, K. 0: train whole epochs instead.
    local_epochs : int
        Passes over the client's data, when `local_steps` is 0.
    reshuffle : bool
        Whether every pass over the data takes it in a new random order, as a
        DataLoader with ``shuffle=True`` does, or in that of the first.
    batch_norm : {"train", "eval"}
        Mode of BatchNorm layers during local training: normalising by the batch's
        statistics, or by the running ones that the client was sent.
    send_buffers : bool
        Whether the client returns its own running statistics, or those it was sent.
    optimizer_options : tuple of (str, float, bool or tuple of float)
        Further arguments of the optimiser in `torch.optim`, by name, such as betas, eps,
        amsgrad, alpha, centered, dampening, maximize. Given as a mapping. What an optimiser
        takes is checked by `create_optimizer`.
    loss : {"cross_entropy", "mse", "bce"} or callable
        ``mse`` and ``bce`` (with logits) compare logits with one-hot labels, and are means
        over images and classes, as torch's. A callable takes logits (B, num_classes) and
        classes (B,) of int64, or their probabilities (B, num_classes) where an attack fits
        the labels, and returns the batch's loss, shape (). Attack workers import it by
        its name: it has to be a function of a module.
    label_smoothing : float
        In [0, 1), of cross-entropy.
    class_weights : tuple of float
        Cross-entropy's weight of each class, with torch's weighted mean; (): all alike.
    schedule : tuple of float
        Factor of the learning rate at each of the round's optimiser steps; the last one
        holds on. (): 1.
    drop_last : bool
        Whether a pass leaves out its last batch where it is smaller than B, as a
        DataLoader with ``drop_last=True`` does.
    accumulate : int
        Batches whose gradients, each divided by this number, make one optimiser step.
        At the end of a round the client steps on the remainder, divided alike.
    proximal : float
        FedProx's mu, >= 0: adds ``mu / 2 |w - w0|^2`` to the loss (Li et al., MLSys 2020).
    trainable : tuple of str
        Patterns, as in `fnmatch`, of the names of the parameters that train; (): all.
    groups : tuple of ParameterGroup
        The first one whose pattern matches a parameter's name decides its settings.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    batch_size: int = 1
    local_steps: int = 5
    local_epochs: int = 1
    reshuffle: bool = True
    batch_norm: str = "train"
    send_buffers: bool = True
    optimizer_options: Options = ()
    loss: Loss = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    schedule: tuple[float, ...] = ()
    drop_last: bool = False
    accumulate: int = 1
    proximal: float = 0.0
    trainable: tuple[str, ...] = ()
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (
            ("optimizer_options", _options(self.optimizer_options)),
            ("class_weights", _sequence("class_weights", self.class_weights)),
            ("schedule", _sequence("schedule", self.schedule)),
            ("trainable", _sequence("trainable", self.trainable)),
            ("groups", tuple(map(_group, _sequence("groups", self.groups)))),
        ):
            object.__setattr__(self, name, values)
        choices = (
            ("optimizer", OPTIMIZERS),
            ("batch_norm", ("train", "eval")),
            ("loss", LOSSES),
        )
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in allowed and not (name == "loss" and callable(value)):
                more = ", or a callable" * (name == "loss")
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}{more}")
        for name, valid, words in (
            ("lr", self.lr > 0, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "0 to less than 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm >= 0, "0 (no clipping) or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("local_steps", self.local_steps >= 0, "0 (whole epochs) or more"),
            ("local_epochs", self.local_epochs >= 1, "1 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to less than 1"),
            (
                "class_weights",
                all(w >= 0 for w in self.class_weights)
                and (any(self.class_weights) or not self.class_weights),
                "numbers of 0 or more, not all 0",
            ),
            ("schedule", all(factor >= 0 for factor in self.schedule), "numbers of 0 or more"),
            ("accumulate", self.accumulate >= 1, "1 or more"),
            ("proximal", self.proximal >= 0, "0 or more"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {words}")
        for name in ("label_smoothing", "class_weights"):
            if getattr(self, name) and self.loss != "cross_entropy":
                raise ValueError(
                    f"{name} is {getattr(self, name)}; allowed with loss {_named(self.loss)}: none"
                )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is {self.momentum}; allowed with {self.optimizer}: 0")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true; allowed only with momentum above 0")

    @property
    def adaptive(self) -> bool:
        """Whether steps are divided by the size of gradients, and so hide it."""
        return self.optimizer not in ("sgd", "asgd")

    def beyond(self, *known: str) -> str:
        """Return a setting that plain SGD, Adam and AdamW have not, in words; "": there is none.

        What is derived for those three alone has to refuse all other training.

        Parameters
        ----------
        *known : str
            Names of settings that may be set.
        """
        if self.optimizer not in ("adam", "adamw", "sgd") and "optimizer" not in known:
            return f"optimizer is {self.optimizer}"
        names = [each.name for each in fields(self)]
        for each in fields(self)[names.index("send_buffers") + 1 :]:
            value = getattr(self, each.name)
            if each.name not in known and value != each.default:
                return f"{each.name} is {_named(value)}"
        return ""

    def factor(self, step: int) -> float:
        """Return the schedule's factor of the learning rate at an optimiser step, from 0."""
        return self.schedule[min(step, len(self.schedule) - 1)] if self.schedule else 1.0

    def trains(self, name: str) -> bool:
        """Return whether a parameter is trained, by its name."""
        return not self.trainable or any(fnmatchcase(name, each) for each in self.trainable)

    def rates(self, name: str) -> tuple[float, float]:
        """Return the learning rate and weight decay of a parameter, by its name."""
        group = next((each for each in self.groups if fnmatchcase(name, each.pattern)), None)
        lr, decay = (group.lr, group.weight_decay) if group else (None, None)
        return self.lr if lr is None else lr, self.weight_decay if decay is None else decay

    def passes(self, num_examples: int) -> int:
        """Return how often a client with N examples goes through its data, begun passes too."""
        if not self.local_steps:
            return self.local_epochs
        return math.ceil(self.local_steps / self.steps_a_pass(num_examples))

    def steps_a_pass(self, num_examples: int) -> int:
        """Return how many local steps take a client with N examples once through its data.

        Raises
        ------
        ValueError
            If it has no full batch, and `drop_last` leaves out the others.
        """
        if not self.drop_last:
            return math.ceil(num_examples / self.batch_size)
        if num_examples < self.batch_size:
            raise ValueError(
                f"num_examples is {num_examples}; allowed with drop_last: batch_size, "
                f"{self.batch_size}, or more, since a pass has no other batch"
            )
        return num_examples // self.batch_size

    def batches(self, num_examples: int) -> tuple[tuple[int, ...], ...]:
        """Return which images each local step trains on, as the server assumes it.

        The images are numbered in the order of the first pass, which loses
        nothing. Later passes are assumed to keep that order; a client that
        reshuffles them is matched only approximately.

        With `drop_last`, or in fewer steps than a pass has, the last of N images may be in
        no batch. A client that reports all N that it holds, not those it trained
        on, has such images: the update says nothing of them, and what an attack
        returns in their place is its image prior's.

        Parameters
        ----------
        num_examples : int
            Images that the client says it trained on, N.

        Returns
        -------
        tuple of tuples of int
            For each of the K steps the indices of its images in [0, N).

        Raises
        ------
        ValueError
            See `steps_a_pass`.
        """
        one_pass = [
            tuple(range(start, min(start + self.batch_size, num_examples)))
            for start in range(0, num_examples, self.batch_size)
        ][: self.steps_a_pass(num_examples)]
        steps = self.local_steps or self.local_epochs * len(one_pass)
        return tuple(one_pass[step % len(one_pass)] for step in range(steps))


def _sequence(name: str, values: Iterable[_Each]) -> tuple[_Each, ...]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}; allowed: a list")
    return tuple(values)


def _options(options: Any) -> Options:
    """Return an optimiser's options, a mapping or pairs, as sorted pairs that can be hashed."""
    pairs = options.items() if isinstance(options, Mapping) else options or ()
    try:
        found = {str(name): value for name, value in pairs}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer_options is {options!r}; allowed: a mapping of names to values"
        ) from error
    for name, value in found.items():
        numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(
                f"optimizer_options.{name} is {value!r}; allowed: a number, true, false, or a "
                "list of numbers"
            )
        found[name] = numbers if isinstance(value, list | tuple) else value
    return tuple(sorted(found.items()))


def _group(group: Any) -> ParameterGroup:
    if isinstance(group, ParameterGroup):
        return group
    names = [each.name for each in fields(ParameterGroup)]
    if not isinstance(group, Mapping) or "pattern" not in group or not set(group) <= set(names):
        raise ValueError(f"groups holds {group!r}; allowed: pattern, and {', '.join(names[1:])}")
    return ParameterGroup(**group)


def _named(value: object) -> str:
    return str(getattr(value, "__name__", value)) if callable(value) else str(value)

"""The words of the wire: what both sides, and an attack, may speak of.

Observation, Knowledge and Reconstruction are three of the project's five
nouns; Truth and Leakage belong to the auditor (`fl_app.audit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor


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
class LocalTraining:
    """How a client trains locally: agreed by the protocol, so the server knows it.

    Attributes
    ----------
    optimizer : {"adam", "adamw", "sgd"}
        As in `torch.optim`; its state starts anew in every round.
    lr : float
        Learning rate, > 0.
    momentum : float
        Momentum of SGD in [0, 1).
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

    def __post_init__(self) -> None:
        choices = (("optimizer", ("adam", "adamw", "sgd")), ("batch_norm", ("train", "eval")))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        for name, valid, words in (
            ("lr", self.lr > 0, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "0 to less than 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("max_grad_norm", self.max_grad_norm >= 0, "0 (no clipping) or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("local_steps", self.local_steps >= 0, "0 (whole epochs) or more"),
            ("local_epochs", self.local_epochs >= 1, "1 or more"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {words}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum is {self.momentum}; allowed with {self.optimizer}: 0")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true; allowed only with momentum above 0")

    def passes(self, num_examples: int) -> int:
        """Return how often a client with N examples goes through its data, begun passes too."""
        if not self.local_steps:
            return self.local_epochs
        return math.ceil(self.local_steps * self.batch_size / num_examples)

    def steps_a_pass(self, num_examples: int) -> int:
        """Return how many local steps take a client with N examples once through its data."""
        return math.ceil(num_examples / self.batch_size)

    def batches(self, num_examples: int) -> tuple[tuple[int, ...], ...]:
        """Return which images each local step trains on, as the server assumes it.

        The images are numbered in the order of the first pass, which loses
        nothing. Later passes are assumed to keep that order; a client that
        shuffles them anew is explained only approximately.

        Parameters
        ----------
        num_examples : int
            Distinct images that the client trained on, N.

        Returns
        -------
        tuple of tuples of int
            For each of the K steps the indices of its images in [0, N).
        """
        one_pass = [
            tuple(range(start, min(start + self.batch_size, num_examples)))
            for start in range(0, num_examples, self.batch_size)
        ]
        steps = self.local_steps or self.local_epochs * len(one_pass)
        return tuple(one_pass[step % len(one_pass)] for step in range(steps))


@dataclass(frozen=True)
class Defense:
    """What a client does to its update, or its model, so that less is seen in it.

    Agreed by the protocol, so the server knows it. The steps act in the order of
    the attributes; every one is off by default. `client_app.defenses` and
    `client_app.defended_steps` hold each one's formula and source.

    Attributes
    ----------
    soteria : float
        Share of the representation that is pruned in local training, in [0, 1).
    dp_clip : float
        DP-SGD: bound of the L2 norm of each image's gradient; 0: no DP-SGD.
    dp_noise : float
        DP-SGD: the noise's standard deviation in units of `dp_clip`, > 0 with it.
    delta : float
        Of the (epsilon, delta) that DP-SGD reports and `local_dp` asks for, in (0, 1).
    clip : float
        Bound of the update, see `clip_by`; 0: none.
    clip_by : {"value", "norm"}
        Whether `clip` bounds every coordinate, or the L2 norm of the whole update.
    sparsify : float
        Share of the coordinates that moved, those of least magnitude in the whole
        update, that are set to zero, in [0, 1).
    noise : {"none", "gaussian", "laplace"}
        What is added to every coordinate.
    sigma : float
        The noise's standard deviation, > 0 where there is noise.
    relative : bool
        Whether `sigma` is in units of the update's root mean square before the
        noise, or absolute.
    quantize : {"none", "bf16", "int8"}
        The number format that the update is sent in; int8 with one scale a tensor.
    local_dp : float
        Epsilon of Flower's LocalDpMod, which clips the update's L2 norm to `clip`
        and adds Gaussian noise; 0: none. See `plain`.
    secagg : bool
        Whether the server sees only the sum over a round's clients, see `Observation`.
    precode : int
        Size k of the model's variational bottleneck, 0: none. With `dropout` a
        part of the model, see `fl_app.models.extensions`, not of the update.
    dropout : float
        Share of the features before the classifier that a local step sets to zero.
    """

    soteria: float = 0.0
    dp_clip: float = 0.0
    dp_noise: float = 0.0
    delta: float = 1e-5
    clip: float = 0.0
    clip_by: str = "value"
    sparsify: float = 0.0
    noise: str = "none"
    sigma: float = 0.0
    relative: bool = False
    quantize: str = "none"
    local_dp: float = 0.0
    secagg: bool = False
    precode: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "clip_by": ("value", "norm"),
            "noise": ("none", "gaussian", "laplace"),
            "quantize": ("none", "bf16", "int8"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        for name, valid, words in (
            ("soteria", 0 <= self.soteria < 1, "0 to less than 1"),
            ("dp_clip", self.dp_clip >= 0, "0 (no DP-SGD) or more"),
            ("dp_noise", self.dp_noise >= 0, "0 or more"),
            ("delta", 0 < self.delta < 1, "more than 0 and less than 1"),
            ("local_dp", self.local_dp >= 0, "0 (none) or more"),
            ("clip", self.clip >= 0, "0 (none) or more"),
            ("sparsify", 0 <= self.sparsify < 1, "0 to less than 1"),
            ("sigma", self.sigma >= 0, "0 or more"),
            ("precode", self.precode >= 0, "0 (none) or more"),
            ("dropout", 0 <= self.dropout < 1, "0 (none) to less than 1"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {words}")
        if (self.noise == "none") != (self.sigma == 0):
            words = "0 without noise" if self.sigma else f"more than 0 with {self.noise} noise"
            raise ValueError(f"sigma is {self.sigma}; allowed: {words}")
        if (self.dp_clip == 0) != (self.dp_noise == 0):
            words = "0 without dp_clip" if self.dp_noise else "more than 0 with dp_clip"
            raise ValueError(f"dp_noise is {self.dp_noise}; allowed: {words}")
        if self.soteria and self.dp_clip:
            raise ValueError(
                f"soteria is {self.soteria}; allowed with dp_clip: 0, for DP-SGD takes its "
                "own gradients of single images"
            )
        others = (self.noise, self.quantize, self.sparsify) != ("none", "none", 0)
        if self.local_dp and (not self.clip or self.clip_by != "norm" or others):
            raise ValueError(
                f"local_dp is {self.local_dp}; allowed above 0 only with clip above 0 and "
                "clip_by=norm, without sparsify, noise and quantize"
            )

    def plain(self) -> Defense:
        """Return the same defence with `local_dp` spelled out as the noise that it adds.

        Its standard deviation is ``2 clip sqrt(2 ln(1.25 / delta)) / epsilon``: the
        Gaussian mechanism for a sensitivity of ``2 clip``, by which an update of
        norm ``clip`` can change (Dwork & Roth, 2014, theorem A.1, which holds for an
        epsilon up to 1; Flower takes any).
        """
        if not self.local_dp:
            return self
        sigma = 2 * self.clip * math.sqrt(2 * math.log(1.25 / self.delta)) / self.local_dp
        return replace(self, local_dp=0.0, noise="gaussian", sigma=sigma)

    def __str__(self) -> str:
        """Say what is on, as settings: "clip=0.05 noise=gaussian sigma=0.01", or "none"."""
        words = []
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != setting.default:
                shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
                words.append(f"{setting.name}={shown}")
        return " ".join(words) or "none"


def trained_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the weights that an optimiser steps: no BatchNorm statistics."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return tuple(name for name in names if not name.endswith(statistics))


def observation_id(round_: int, node: int) -> str:
    """Return the id of an Observation."""
    return f"round-{round_:04d}-node-{node}"


def round_and_node(id_: str) -> tuple[int, int]:
    """Return the round and the node that an Observation's id names."""
    _, round_, _, node = id_.split("-")
    return int(round_), int(node)


@dataclass(frozen=True)
class Observation:
    """Exactly what an honest-but-curious server has seen of one client in one round.

    Under secure aggregation (`Defense.secagg`) it sees no single update: then one
    Observation is the sum over all clients of the round. Its `w1` is the mean of
    the clients' weights, weighted by their `num_examples`, as FedAvg makes it; its
    `num_examples` is their total, and the images and labels of its truth are those
    of the clients one after another, in the order of `nodes`. Local step k of the
    sum is local step k of every client.

    Attributes
    ----------
    w0, w1 : mapping of str to Tensor
        Parameters by name, as sent to and as returned by the client. The
        descent direction is ``w0 - w1``: a gradient's sign, not its negative.
    num_examples : int
        Images that the client says it trained on, N.
    round : int
        Server round, from 1.
    node : int
        Flower's node id, from the message's metadata; 0 for a sum.
    client : int
        The partition that the client says it holds; `node` where it says none.
        For people to read: nothing relies on it. -1 for a sum.
    nodes, clients, examples : tuple of int
        Of a sum: the node, the `client` and the `num_examples` of each update in it,
        in the order of `clients`. Empty for a single client.
    """

    w0: Mapping[str, Tensor]
    w1: Mapping[str, Tensor]
    num_examples: int
    round: int
    node: int
    client: int
    nodes: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """A name for files, unique in a run."""
        return observation_id(self.round, self.node)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the weights that an optimiser steps: all but BatchNorm's running statistics."""
        return trained_names(self.w0)

    @property
    def update(self) -> dict[str, Tensor]:
        """The update, w1 - w0, of the weights in `trained`."""
        return {name: self.w1[name] - self.w0[name] for name in self.trained}


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
    defense: Defense = Defense()
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


@dataclass(frozen=True)
class Budget:
    """What an attack may spend.

    Attributes
    ----------
    iterations : int
        Steps on the images, >= 1.
    seconds : float
        Wall-clock limit of the iterations; 0: none.
    seed : int
        Seeds the start images and the prior's noise.
    device : str
        The torch device to work on.
    """

    iterations: int = 300
    seconds: float = 0.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; allowed: 1 or more")
        if self.seconds < 0:
            raise ValueError(f"seconds is {self.seconds}; allowed: 0 (no limit) or more")


@dataclass(frozen=True)
class Reconstruction:
    """What an attack believes a client's private images to be.

    Attributes
    ----------
    attack : str
        Name of the attack.
    explanation : str
        How it explained the update, and why so.
    images : Tensor, shape (N, C, H, W)
        In [0, 1], in training order as the attack believes it.
    labels : tuple of int
        N class indices.
    losses : tuple of float
        The matching loss by iteration, without the priors.
    iterations : int
        Steps made.
    seconds : float
        Wall-clock time of the attack, with what it inferred and loaded before its
        first iteration; from a call of its function, of the iterations alone.
    peak_memory : int
        Bytes that the attack needed at its peak, above what was in use before.
    flops : int
        Floating-point operations in all; a multiply-add counts as two.
    stop_reason : str
        Why the optimisation ended.
    options : mapping
        Every constant that the attack ran with.
    diagnosis : tuple of str
        Sentences on what is likely wrong with the update or its explanation.
    labels_source : str
        "given" by the auditor, or the method that recovered them from the update.
    """

    attack: str
    explanation: str
    images: Tensor
    labels: tuple[int, ...]
    losses: tuple[float, ...]
    iterations: int
    seconds: float
    peak_memory: int
    flops: int
    stop_reason: str
    options: Mapping[str, float | int | str] = field(default_factory=dict)
    diagnosis: tuple[str, ...] = ()
    labels_source: str = "given"

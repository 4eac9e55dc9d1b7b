"""How a client trains locally."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains locally: agreed by the protocol, so the server knows it.

    Attributes
    ----------
    optimizer : {"adam", "adamw", "sgd"}
        As in `torch.optim`; its state is reset in every round.
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
        reshuffles them is matched only approximately.

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

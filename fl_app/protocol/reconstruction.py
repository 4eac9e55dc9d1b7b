"""What an attack may spend, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
        Restarts the start images and the prior's noise.
    device : str
        The torch device to work on.
    recovery_threshold : float
        Matching loss that ends a search once it is as low: an attacker sees this loss, and
        so can stop by it (the paper, experimental set-up). 0: none.
    """

    iterations: int = 300
    seconds: float = 0.0
    seed: int = 0
    device: str = "cpu"
    recovery_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; allowed: 1 or more")
        if self.seconds < 0:
            raise ValueError(f"seconds is {self.seconds}; allowed: 0 (no limit) or more")
        if self.recovery_threshold < 0:
            raise ValueError(
                f"recovery_threshold is {self.recovery_threshold}; allowed: 0 (none) or more"
            )


@dataclass(frozen=True)
class Reconstruction:
    """An attack's estimate of a client's private images.

    Attributes
    ----------
    attack : str
        Name of the attack.
    matching : str
        How it matched the update, and why so.
    images : Tensor, shape (N, C, H, W)
        In [0, 1], in the training order that the attack found.
    labels : tuple of int
        N class indices.
    losses : tuple of float
        The matching loss by iteration, without the priors.
    iterations : int
        Steps made.
    seconds : float
        Wall-clock time of the attack, with what it inferred and loaded before its
        first iteration.
    peak_memory : int
        Bytes that the attack needed at its peak, above what was in use before.
    flops : int
        Floating-point operations in all; a multiply-add counts as two.
    stop_reason : str
        Why the optimisation ended.
    options : mapping
        Every constant that the attack ran with.
    diagnosis : tuple of str
        Sentences on what is likely wrong with the update or its matching.
    labels_source : str
        "given" by the auditor, or the method that inferred them, or their order, from the
        update.
    determined : tuple of (float or None)
        By image the share of it, in [0, 1], that features of it determine well which the update
        holds exactly; the rest hangs on weak answers and on the prior. None where it holds none;
        empty where the attack did not look for any.
    labels_level : {"by-step", "counts", "unknown"}
        What the attack was given of the labels, see `Knowledge`.
    """

    matching: str
    images: Tensor
    labels: tuple[int, ...]
    losses: tuple[float, ...]
    iterations: int
    seconds: float
    peak_memory: int
    flops: int
    stop_reason: str
    attack: str = ""
    options: Mapping[str, float | int | str] = field(default_factory=dict)
    diagnosis: tuple[str, ...] = ()
    labels_source: str = "given"
    labels_level: str = "by-step"
    determined: tuple[float | None, ...] = ()

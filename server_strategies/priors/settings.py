"""How a flow prior is trained: free of torch, for the command's help."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_app.config import LAST_SEED


@dataclass(frozen=True)
class TrainingSettings:
    """How a flow prior is trained.

    Attributes
    ----------
    network : str
        A name in `networks.NETWORKS`.
    images : int
        Images to see in all; the learning rate falls by cosine towards it.
    minutes : float
        Training stops after so many minutes, over all resumptions, with its
        learning rate fallen as far as by `images`. 0: no limit.
    batch_size : int
        Images a step.
    learning_rate : float
        Peak rate of AdamW, reached after `warmup` steps.
    warmup : int
        Steps of linear warm-up.
    ema : float
        Decay of the exponential moving average of the weights.
    focus : float
        Share of the flow times drawn from [0.6, 1], where attacks use the
        network; the others come from [0, 0.6].
    seed : int
    start : str
        Weights to begin with, as `find_weights` takes them; "": at random.
    """

    network: str = "compact"
    images: int = 1_500_000
    minutes: float = 0.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 300
    ema: float = 0.999
    focus: float = 0.8
    seed: int = 0
    start: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("images", 1, math.inf),
            ("minutes", 0, math.inf),
            ("batch_size", 1, math.inf),
            ("learning_rate", 0, 1),
            ("ema", 0, 1),
            ("focus", 0, 1),
            ("seed", 0, LAST_SEED),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                words = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise ValueError(f"{name} is {value}; allowed: {words}")

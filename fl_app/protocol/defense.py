"""What a client does so that less is seen in its update."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace


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
    custom : str
        A defence of another package by its name in `fl_app.registry.DEFENSES`, which acts
        on the update after the noise; "": none.
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
    custom: str = ""
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
        others = (self.noise, self.quantize, self.sparsify, self.custom) != ("none", "none", 0, "")
        if self.local_dp and (not self.clip or self.clip_by != "norm" or others):
            raise ValueError(
                f"local_dp is {self.local_dp}; allowed above 0 only with clip above 0 and "
                "clip_by=norm, without sparsify, noise, custom and quantize"
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

"""One line of a benchmark's table: a client, its protocol, and the attack on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from client_app.training import NO_DEFENSE
from fl_app.config import AttackConfig
from fl_app.models import chosen_norm
from fl_app.protocol import Defense, LocalTraining
from fl_app.protocol.knowledge import model_name

RECOGNISED = 20.0
"""PSNR in dB over which people recognise an image of 32x32 at a glance."""


@dataclass(frozen=True)
class Case:
    """One line of a benchmark's table.

    Attributes
    ----------
    training : LocalTraining
        `local_steps` above 0.
    attack : AttackConfig
    threshold : float or None
        Mean PSNR in dB over the trials that the case has to reach.
    gain : float or None
        Mean PSNR in dB by which it has to beat the case that it is compared with
        (`AttackResults.reference`); its LPIPS VGG has to be the lower one, too.
    within : float or None
        Mean PSNR in dB by which it may be below the case that it is compared with.
    first : bool
        Whether no other case of its client and its budget may have a higher mean PSNR.
    model : str or callable
        A name in `fl_app.models`, or a function that makes a user's own model.
    norm, head : str
        See `create_model`.
    num_examples : int
        Images that the client holds, N; 0: as many as it takes for one pass, K B.
    labels : {"by-step", "counts", "unknown"}
        What the attacker is given of the labels, see `Knowledge`.
    state : str
        Model that the client is sent: ``init``, drawn by the trial's seed, or ``epoch-N`` or
        ``converged``, see `trained_state`.
    recognised : float or None
        Share of all images that have to be over `RECOGNISED` dB.
    identified : float or None
        Share of all images that have to be identified.
    above_mean_colour : float or None
        Mean PSNR in dB by which it has to beat an image of the mean colour.
    defense : Defense
        What the client does so that less is seen; without `secagg`.
    defense_known : bool
        Whether the attacker knows it.
    federations : int
        Restarts of the federation that is trained to see what the defence costs.
    """

    training: LocalTraining
    attack: AttackConfig
    threshold: float | None = None
    gain: float | None = None
    within: float | None = None
    first: bool = False
    model: Any = "convnet"
    num_examples: int = 0
    labels: str = "counts"
    norm: str = ""
    head: str = ""
    state: str = "init"
    recognised: float | None = None
    identified: float | None = None
    above_mean_colour: float | None = None
    defense: Defense = NO_DEFENSE
    defense_known: bool = True
    federations: int = 1

    @property
    def count(self) -> int:
        """Images that the client trains on, N."""
        return self.num_examples or self.training.local_steps * self.training.batch_size

    @property
    def client(self) -> str:
        """The client's side in words, and what of it is not known."""
        t = self.training
        known = isinstance(self.model, str)
        name = model_name(self.model).rpartition(":")[2]
        words = [] if self.model == "convnet" and not self.norm else [name]
        words += [f"head {self.head}"] * bool(self.head)
        norm = chosen_norm(self.model, self.norm) if known else ""
        words += [f"{norm} norm"] * bool(self.norm)
        words += [f"BatchNorm {t.batch_norm}"] * (norm == "batch")
        words += ["statistics kept"] * (norm == "batch" and not t.send_buffers)
        words.append(f"{t.optimizer} {t.lr:g}")
        for name in ("momentum", "weight_decay", "max_grad_norm"):
            words += [f"{name} {getattr(t, name):g}"] * bool(getattr(t, name))
        words += ["nesterov"] * t.nesterov
        words.append(f"K={t.local_steps} B={t.batch_size}")
        if t.passes(self.count) > 1:
            order = "reshuffled" if t.reshuffle else "in order"
            words.append(f"N={self.count} {t.passes(self.count)} passes {order}")
        words += [f"at {self.state}"] * (self.state != "init")
        if self.defense != NO_DEFENSE:
            words += [f"{self.defense}", "known" if self.defense_known else "unknown"]
        return " ".join(words)

    @property
    def name(self) -> str:
        """Names the case in the results: everything that decides it but the trial."""
        return f"{self.client}, labels {self.labels}, {self.attack_words}"

    @property
    def attack_words(self) -> str:
        """The attack, its options and its budget."""
        options = "".join(f" {key}={value}" for key, value in sorted(self.attack.options.items()))
        limit = f" {self.attack.seconds:g} s" if self.attack.seconds else ""
        limit = limit or f" x{self.attack.iterations}"
        if self.attack.recovery_threshold:
            limit += f" or a loss of {self.attack.recovery_threshold:g}"
        return f"{self.attack.name}{options}{limit}"

    @property
    def arena(self) -> tuple[str, int, float]:
        """Client and budget: cases that share them are compared."""
        return self.client, self.attack.iterations, self.attack.seconds

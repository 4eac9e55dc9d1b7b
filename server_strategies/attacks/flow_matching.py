"""Deep leakage with a generative flow matching denoiser: the attack of the paper.

Update matching + a flow-matching prior + a little total variation (eq. 18). The paper
matches by a surrogate with alpha fitted jointly, which is `matching="surrogate"`. By
default the client's own optimiser is simulated where that is possible: it matches SGD
better, and Adam at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from server_strategies.attacks.attack import Attack, Parts, Task
from server_strategies.attacks.gauss_newton import decodes
from server_strategies.attacks.matching.adam.decode import Decoded
from server_strategies.attacks.matching.base import MatchingObjective
from server_strategies.attacks.matching.defended import noise_share
from server_strategies.attacks.optimise import cosine_schedule
from server_strategies.attacks.options import COSINE_LR, DISTANCE, MATCHING, STATISTICS, TV, option
from server_strategies.priors.flow import MODES, FlowPrior
from server_strategies.priors.total_variation import TotalVariation

PRIOR_STRENGTH = {"sgd": (0.1, 0.05), "adam": (1.5, 0.45)}
"""The default `prior_strength` and `final_prior_strength`. A smoothed Adam needs more of the
priors: its late batches hardly enter the update. Chosen by `flowleak bench constants`, Adam's
on K=5, B=4, SGD's on four clients. Decoded images with Adam need more
as well: not all of their features are known."""

_SEARCHED, _DECODED = (0.03, 0.8), (0.0, 0.6)  # the default `tv` and `t_start`

_EVERY = {"rows": 4, "sgd": 2}
"""The default `every` where single-step rows of Adam are matched, and where SGD's steps are
simulated; 1 elsewhere. `flowleak bench constants`: rows, K=5, untrained, B=4, 50 s, 24.0 dB for
23.1 with 1; B=1, 12 s, 29.9 for 30.4. SGD, B=4, 200 iterations: 26.8 dB for 26.6 with 1 and 26.2
with 4. Where exact features are decoded, 1 is ahead: 24.1 for 20.8 with 4."""


@dataclass(frozen=True)
class FlowMatching(Attack):
    """Update matching with a flow-matching prior and total variation: the paper's attack.

    Source: Deep Leakage with Generative Flow Matching Denoiser (the paper), eq. 18.
    """

    name: ClassVar[str] = "flow_matching"
    needs_prior: ClassVar[bool] = True

    matching: str = option("auto", MATCHING)
    distance: str = option("auto", DISTANCE)
    mode: str = option("denoiser", "form of the flow penalty; velocity: eq. 17", allowed=MODES)
    lr: float = option(0.8, COSINE_LR)
    flow: float = option(1.0, "weight of the flow prior; 0: left out, at no cost", low=0)
    tv: float | None = option(None, TV)
    prior_strength: float | None = option(
        None, "first ratio of gradient norms, priors to matching; 0: weights alone", low=0
    )
    final_prior_strength: float | None = option(None, "the ratio at the end", low=1e-6)
    t_start: float | None = option(None, "flow time t(k) at the first iteration", low=1e-6, high=1)
    t_end: float = option(0.95, "flow time t(k) at the last iteration", low=1e-6, high=1)
    every: int | None = option(
        None,
        "iterations from one run of the denoiser to the next; null: 4 for gradient rows, 2 for "
        "simulated SGD, 1 else",
        low=1,
    )
    draws: int = option(1, "draws of noise that a run of the denoiser averages", low=1)
    polish: float = option(0.0, "share of the last iterations, without flow", low=0, high=0.99)
    statistics: float = option(0.1, STATISTICS)
    tiles: bool = option(False, "whether the prior sees images larger than its own in tiles")
    relu_smoothing: float | None = option(
        None, "width of ReLU's surrogate gradient in second derivatives; 0: none", low=0
    )

    def parts(self, task: Task) -> Parts:
        """See `Attack`."""
        matching = task.matching(
            self.matching, distance=self.distance, relu_smoothing=self.relu_smoothing
        )
        search = self._parts(task, matching, *_SEARCHED)
        if not decodes(matching):
            return search
        return replace(self._parts(task, matching, *_DECODED, every=1), others=search)

    def _parts(
        self,
        task: Task,
        matching: MatchingObjective,
        tv: float,
        t_start: float,
        every: int | None = None,
    ) -> Parts:
        """Return the parts with defaults for what is not chosen."""
        optimizer = "sgd" if task.known.client.optimizer == "sgd" else "adam"
        first, last = PRIOR_STRENGTH[optimizer]
        first = first if self.prior_strength is None else self.prior_strength
        last = last if self.final_prior_strength is None else self.final_prior_strength
        tv = tv if self.tv is None else self.tv
        t_start = t_start if self.t_start is None else self.t_start
        if every is None:
            kind = "rows" if isinstance(matching, Decoded) else optimizer
            every = _EVERY.get(kind, 1) if self.mode == "denoiser" else 1
        every = every if self.every is None else self.every
        noise = noise_share(list(task.seen.update.values()), task.known.defense)

        def strength(progress: float) -> float:
            # What fits the noise that an update is known to carry is not data: with its share of
            # the update's square the strength falls less, and never below its length's share.
            return max(noise**0.5, first * (last / first) ** ((1 - noise) * progress))

        times = (self.mode, t_start, self.t_end, task.generator(), every, self.draws)
        flow = FlowPrior(task.network, self.flow, *times, self.polish, self.tiles)
        priors: list[TotalVariation | FlowPrior] = [TotalVariation(tv, task.known.std), flow]
        return Parts(
            matching,
            [prior for prior in priors if prior.weight],
            lr=self.lr,
            schedule=cosine_schedule,
            prior_strength=strength if first else None,
            terms=task.statistics(self.statistics),
            chosen={
                "prior_strength": first,
                "final_prior_strength": last,
                "relu_smoothing": matching.relu_smoothing,
                "tv": tv,
                "t_start": t_start,
                "every": every,
            },
        )

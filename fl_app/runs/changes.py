"""What clients could do otherwise, each of which `flowleak advise` tries on a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fl_app.models import chosen_norm
from fl_app.protocol import Defense, Knowledge, LocalTraining, Observation
from fl_app.registry import MODELS
from fl_app.runs.advice import AS_IT_IS
from fl_app.runs.privacy import noise_for

EPSILON = 8.0
"""Of the DP-SGD that is tried for its guarantee: about the most that is called one."""

_NORMS = {"batch": "BatchNorm", "group": "GroupNorm"}


@dataclass(frozen=True)
class Change:
    """Something that the clients could do otherwise.

    Attributes
    ----------
    words : str
        Names it.
    defense : Defense or None
        In the place of the run's; None: as it is.
    one_batch : bool
        All images of a client in one local step.
    passes : int
        Times as many passes over the same images.
    norm : str
        What the model's activations are normalised by; "": as it is.
    """

    words: str
    defense: Defense | None = None
    one_batch: bool = False
    passes: int = 1
    norm: str = ""

    @property
    def key(self) -> str:
        """Name of its folder."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.words).split())

    def training(self, own: LocalTraining, count: int) -> LocalTraining:
        """Return the clients' training with the change, of so many images."""
        if self.one_batch:
            return replace(own, local_steps=1, local_epochs=1, batch_size=count)
        if own.local_steps:
            return replace(own, local_steps=self.passes * own.local_steps)
        return replace(own, local_epochs=self.passes * own.local_epochs)


def changes_for(
    taken: Sequence[Observation], training: LocalTraining, known: Knowledge, rounds: int
) -> tuple[Change, ...]:
    """Return what is tried on some clients; `AS_IT_IS` is what the others are held against.

    Parameters
    ----------
    taken : sequence of Observation
        Updates of one round; they decide the bound of clipping.
    training : LocalTraining
        The clients'.
    known : Knowledge
        Whose model it is.
    rounds : int
        Over which DP-SGD spends its epsilon.
    """
    return (
        Change(AS_IT_IS),
        Change("secure aggregation", Defense(secagg=True)),
        Change("updates in bfloat16", Defense(quantize="bf16")),
        Change("updates in int8", Defense(quantize="int8")),
        *_clipped(taken),
        Change("noise as large as the update", Defense(noise="gaussian", sigma=1.0, relative=True)),
        Change("noise 10 times the update", Defense(noise="gaussian", sigma=10.0, relative=True)),
        Change("90% of the update left out", Defense(sparsify=0.9)),
        Change("99% of the update left out", Defense(sparsify=0.99)),
        Change("DP-SGD, clip 1, noise 0.1", Defense(dp_clip=1.0, dp_noise=0.1)),
        _private(times_seen(taken, training, rounds)),
        Change("all images of a round in one batch", one_batch=True),
        Change("4 times the passes", passes=4),
        *_normalised(taken, known),
    )


def times_seen(taken: Sequence[Observation], training: LocalTraining, rounds: int) -> int:
    """Return in how many batches one image of these clients is at most, over some rounds.

    A client that does not reach all its images in a round trains on each once.
    """
    return rounds * max(training.passes(each.num_examples) for each in taken)


def _clipped(taken: Sequence[Observation]) -> Iterator[Change]:
    """Yield clipping to a norm that every update has to give way to."""
    norms = [
        math.sqrt(sum(float(delta.double().square().sum()) for delta in each.update.values()))
        for each in taken
    ]
    bound = f"{min(norms) / 2:.2g}"
    if float(bound):  # else an update is nothing
        words = f"update clipped to the norm {bound}, half of its own"
        yield Change(words, Defense(clip=float(bound), clip_by="norm"))


def _private(times: int) -> Change:
    """Return DP-SGD of the least noise, of three digits, that keeps to `EPSILON`."""
    least = noise_for(EPSILON, times, Defense().delta)
    digits = 2 - math.floor(math.log10(least))
    noise = math.ceil(least * 10**digits) / 10**digits
    words = f"DP-SGD at epsilon {EPSILON:g}: clip 1, noise {noise:g}"
    return Change(words, Defense(dp_clip=1.0, dp_noise=noise))


def _normalised(taken: Sequence[Observation], known: Knowledge) -> Iterator[Change]:
    """Yield the other norm of a model of ours that has BatchNorm or GroupNorm.

    The recorded model's weights are not its own: it begins where as many rounds lead it.
    """
    if not isinstance(known.model, str):
        return
    own = chosen_norm(known.model, known.norm)
    other = {"batch": "group", "group": "batch"}.get(own, "")
    if other in MODELS[known.model].norms:
        done = taken[0].round - 1
        begins = f"trained again for {done} round{'s' * (done > 1)}" if done else "at its start"
        words = f"{_NORMS[other]} for {_NORMS[own]}, {begins}"
        yield Change(words, norm=other)

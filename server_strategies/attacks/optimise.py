"""The one loop of every attack that optimises images."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fl_app.protocol import Budget, Knowledge, Reconstruction
from server_strategies.attacks.explain import Explanation

Prior = Callable[[Tensor, float], Tensor]
"""Penalty, shape (), of images in [0, 1] (N, C, H, W) at a progress in [0, 1]."""

Report = Callable[[int, float], None]
"""Called about once a second with the iteration and the matching loss."""


class AttackError(RuntimeError):
    """An attack that could not go on; the message says why."""


def cosine_schedule(progress: float, last: float = 0.02) -> float:
    """Return the learning rate's factor, which falls from 1 to `last` by a half cosine."""
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))


def step_schedule(progress: float) -> float:
    """Return the learning rate's factor: x0.1 at 3/8, 5/8 and 7/8 (Geiping et al., 2020)."""
    return 0.1 ** sum(progress >= milestone for milestone in (3 / 8, 5 / 8, 7 / 8))


def optimise(
    attack: str,
    explanation: Explanation,
    priors: Sequence[Prior],
    knowledge: Knowledge,
    budget: Budget,
    *,
    lr: float,
    schedule: Callable[[float], float],
    unknowns_lr: float = 1e-3,
    report: Report | None = None,
    options: Mapping[str, float | int | str],
) -> Reconstruction:
    """Minimise ``explanation(x) + sum of priors`` over images.

    Adam on normalised pixels from N(0, I), boxed to those of images in [0, 1]
    after every step, with the explanation's own unknowns beside them, boxed to
    [0, 1]. The result is the last iterate: nothing is chosen by its likeness to
    the truth.

    Parameters
    ----------
    attack : str
        The attack's name, for the result.
    explanation : Explanation
        Gives the matching loss of normalised images.
    priors : sequence of Prior
    knowledge : Knowledge
        With labels.
    budget : Budget
    lr : float
        Peak learning rate on normalised pixels.
    schedule : callable
        Factor of every learning rate by progress in [0, 1).
    unknowns_lr : float
        Peak learning rate of the explanation's unknowns.
    report : Report, optional
    options : mapping
        The attack's constants, for the result.

    Raises
    ------
    AttackError
        If the loss is no longer finite.
    """
    labels = knowledge.labels or ()
    device = torch.device(budget.device)
    mean = torch.tensor(knowledge.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(knowledge.std, device=device).view(-1, 1, 1)
    low, high = -mean / std, (1 - mean) / std
    generator = torch.Generator(device).manual_seed(budget.seed)
    x = torch.randn((len(labels), *knowledge.image_shape), generator=generator, device=device)
    x = x.clamp_(low, high).requires_grad_()
    groups: list[dict[str, object]] = [{"params": [x], "lr": lr, "peak": lr}]
    if explanation.unknowns:
        groups.append({"params": explanation.unknowns, "lr": unknowns_lr, "peak": unknowns_lr})
    optimizer = torch.optim.Adam(groups)
    losses = torch.zeros(budget.iterations, device=device)
    counter = FlopCounterMode(display=False)
    memory = _PeakMemory(device)
    began = reported = time.monotonic()
    stop_reason, done = "iterations", 0
    for iteration in range(budget.iterations):
        progress = iteration / budget.iterations
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(progress)
        with counter if iteration == 0 else nullcontext():
            matching = _backward(explanation, priors, x, mean, std, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            x.clamp_(low, high)
            for unknown in explanation.unknowns:
                unknown.clamp_(0, 1)
        losses[iteration] = matching
        done, now = iteration + 1, time.monotonic()
        # Reading a loss waits for the device, so do it once a second only.
        if now - reported > 1:
            _check_finite(matching, done)
            if report:
                report(done, matching.item())
            reported = now
        if budget.seconds and now - began > budget.seconds:
            stop_reason = "seconds"
            break
    _check_finite(losses[:done], done)
    return Reconstruction(
        attack=attack,
        explanation=explanation.reason,
        images=(x.detach() * std + mean).clamp(0, 1).cpu(),
        labels=labels,
        losses=tuple(losses[:done].tolist()),
        iterations=done,
        seconds=time.monotonic() - began,
        peak_memory=memory.above_start(),
        flops=counter.get_total_flops() * done,
        stop_reason=stop_reason,
        options=options,
    )


def _backward(
    explanation: Explanation,
    priors: Sequence[Prior],
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    progress: float,
) -> Tensor:
    """Back-propagate one iteration's loss; return its matching part."""
    matching = explanation(x)
    images = x * std + mean
    total = matching + sum(prior(images, progress) for prior in priors)
    total.backward(inputs=[x, *explanation.unknowns])
    return matching.detach()


def _check_finite(losses: Tensor, iteration: int) -> None:
    if not torch.isfinite(losses).all():
        raise AttackError(f"the matching loss is not finite by iteration {iteration}")


class _PeakMemory:
    """Peak memory above that at construction, in bytes: the device's, or this process's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        # Linux resets a process's high-water mark on request; elsewhere the mark
        # of the whole process's life is the best there is.
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")
        self.start = self._resident_peak()

    def above_start(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return max(0, self._resident_peak() - self.start)

    @staticmethod
    def _resident_peak() -> int:
        status = Path("/proc/self/status")
        if status.exists():
            fields: Mapping[str, str] = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
            return int(fields["VmHWM"].split()[0]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

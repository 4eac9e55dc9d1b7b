"""Accounting of an attack's run: its budget, its losses, and its costs."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fl_app.protocol import Budget, Observation, Reconstruction
from server_strategies.attacks.diagnosis import diagnose
from server_strategies.attacks.matching.base import MatchingObjective, channel_scale

Report = Callable[[int, float], None]
"""Called about once a second with the iteration and the matching loss."""

_COUNTED = 8
_LOOK = 25  # iterations from one look at the recovery threshold to the next: each waits for a GPU


class AttackError(RuntimeError):
    """An attack that could not go on; the message says why."""


class Run:
    """One run of an attack: its budget, how far it is, and what it costs.

    Parameters
    ----------
    objective : MatchingObjective
    observation : Observation
        For the diagnosis.
    budget : Budget
    report : Report, optional
    counted : int
        Iterations of each part whose floating-point operations are counted.

    Attributes
    ----------
    mean, std : Tensor, shape (C, 1, 1)
        The client's normalisation.
    """

    def __init__(
        self,
        objective: MatchingObjective,
        observation: Observation,
        budget: Budget,
        report: Report | None = None,
        counted: int = _COUNTED,
    ) -> None:
        self._objective, self._observation = objective, observation
        self._budget, self._report = budget, report
        device = torch.device(budget.device)
        self.mean, self.std = channel_scale(objective.knowledge, device)
        self._losses = torch.zeros(budget.iterations, device=device)
        self._counter = _FlopCounter(counted)
        self._memory = _PeakMemory(device)
        self._began = self._reported = time.monotonic()
        self._stop_reason, self._done = "iterations", 0

    def iterations(self) -> Iterator[float]:
        """Yield the progress in [0, 1] at the start of every iteration that the budget holds."""
        total, seconds = self._budget.iterations, self._budget.seconds
        threshold = self._budget.recovery_threshold
        before = spent = 0.0
        for iteration in range(total):
            before, spent = spent, time.monotonic() - self._began
            progress = iteration / total
            # Half an iteration over the time, or under it, where one takes seconds.
            if seconds and iteration and spent + (spent - before) / 2 > seconds:
                self._stop_reason = "seconds"
                return
            if threshold and iteration % _LOOK == 0 and self._reached(threshold, progress):
                self._stop_reason = "recovery threshold"
                return
            # The schedules are to end when the time does.
            yield max(progress, min(spent / seconds, 1.0)) if seconds else progress

    def _reached(self, threshold: float, progress: float) -> bool:
        """Return whether the last loss is as low, and is that of the whole matching."""
        if not self._done or progress < self._objective.restart:
            return False
        return bool(self._losses[self._done - 1] <= threshold)

    def counted(self, progress: float) -> AbstractContextManager[object]:
        """Return a context for an iteration's work on the objective and the priors."""
        return self._counter.watch(progress >= self._objective.restart)

    def note(self, matching: Tensor) -> None:
        """Record the matching loss, shape (), of an iteration that is done.

        Raises
        ------
        AttackError
            If it is no longer finite; it is looked at once a second.
        """
        self._losses[self._done] = matching.detach()
        self._done, now = self._done + 1, time.monotonic()
        # Reading a loss waits for the device, so do it once a second only.
        if now - self._reported > 1:
            self._check_finite(matching)
            if self._report:
                self._report(self._done, matching.item())
            self._reported = now

    def end(self, reason: str) -> None:
        """Say why the search ends before its budget does."""
        self._stop_reason = reason

    def found(self, x: Tensor) -> Reconstruction:
        """Return what the objective makes of the last candidates, and the costs of all.

        Parameters
        ----------
        x : Tensor, shape (candidates * N, C, H, W)
            Normalised images.

        Raises
        ------
        AttackError
            If a loss was not finite.
        """
        self._check_finite(self._losses[: self._done])
        history = tuple(self._losses[: self._done].tolist())
        objective = self._objective
        knowledge, images = objective.knowledge, objective.found_images(x).detach()
        return Reconstruction(
            matching="; ".join([objective.reason, *knowledge.inferred]),
            images=(images * self.std + self.mean).clamp(0, 1).cpu(),
            labels=objective.found_labels(),
            labels_source=knowledge.labels_source,
            labels_level=knowledge.labels_level,
            losses=history,
            iterations=self._done,
            seconds=time.monotonic() - self._began,
            peak_memory=self._memory.above_start(),
            flops=self._counter.total(),
            stop_reason=self._stop_reason,
            diagnosis=diagnose(
                self._observation,
                knowledge,
                history,
                objective.position(),
                objective.at_truth,
                self._budget.device,
            ),
        )

    def _check_finite(self, losses: Tensor) -> None:
        if not torch.isfinite(losses).all():
            raise AttackError(f"the matching loss is not finite by iteration {self._done}")


class _FlopCounter(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas.

    Counting is slow, so a few iterations stand for all of the same part of the
    attack: enough of them for what is done in every m-th alone.

    `torch.utils.flop_counter.FlopCounterMode` also tracks modules, by hooks that
    do not stand gradients taken while another one is.
    """

    def __init__(self, counted: int) -> None:
        super().__init__()
        self._counted = counted
        self._flops, self._iterations, self._part = [0, 0], [0, 0], 0

    def watch(self, restarted: bool) -> AbstractContextManager[object]:
        """Return a context for one iteration, before or after the objective's restart."""
        self._part = int(restarted)
        self._iterations[self._part] += 1
        return self if self._iterations[self._part] <= self._counted else nullcontext()

    def total(self) -> int:
        """Return the operations of all iterations."""
        parts = zip(self._flops, self._iterations, strict=True)
        return sum(flops * count // min(count, self._counted) for flops, count in parts if count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self._flops[self._part] += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _PeakMemory:
    """Peak memory above that at construction, in bytes: the device's, or this process's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        # What earlier work left free is no part of the attack's start: glibc gives
        # it back on request, and without that a second attack would seem to need none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
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

"""The one loop of every attack that follows a gradient, and the books of every attack's run."""

from __future__ import annotations

import ctypes
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fl_app.protocol import Budget, Observation, Reconstruction
from server_strategies.attacks.diagnosis import diagnose
from server_strategies.attacks.explain.base import Explanation

Prior = Callable[[Tensor, float], Tensor]
"""Penalty, shape (), of images in [0, 1] (N, C, H, W) at a progress in [0, 1]."""

Report = Callable[[int, float], None]
"""Called about once a second with the iteration and the matching loss."""

_NEAR = 0.01  # of the learning rate, where the start is a solution that first steps would leave
_LOOK = 3  # iterations from one look whether two images are in each other's place to the next
_AS_GOOD = 0.05  # share by which an exchange may raise the loss, at the start
_COUNTED = 8  # iterations whose floating-point operations are counted


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
    observation: Observation,
    budget: Budget,
    *,
    lr: float,
    schedule: Callable[[float], float],
    balance: Callable[[float], float] | None = None,
    signed: bool = False,
    noise: float = 0.0,
    decode: Callable[[Tensor], Tensor] | None = None,
    decay: float = 0.0,
    evidence: Sequence[Prior] = (),
    report: Report | None = None,
    options: Mapping[str, float | int | str],
) -> Reconstruction:
    """Minimise ``explanation(x) + sum of priors`` over images.

    Adam on normalised pixels from N(0, I), or from the explanation's start, near
    which it stays, boxed to those of images in [0, 1] after every step, with the
    explanation's own unknowns beside them, boxed to theirs. Now and then two images
    that the explanation says may have been found in each other's place change it, if
    that explains the update as well. The result is the explanation's reading of the
    last iterate: nothing is chosen by its likeness to the truth.

    Parameters
    ----------
    attack : str
        The attack's name, for the result.
    explanation : Explanation
        Gives the matching loss of normalised images.
    priors : sequence of Prior
    observation : Observation
        For the diagnosis.
    budget : Budget
    lr : float
        Peak learning rate on normalised pixels.
    schedule : callable
        Factor of every learning rate by progress in [0, 1).
    balance : callable, optional
        By progress, how strongly the priors pull each image, as a multiple of the
        explanation's pull on it. Images of the last steps of a trajectory are felt
        a hundred times less in the update than those of the first: at equal
        weights the priors would decide them alone. None: as the losses are.
    signed : bool
        Whether the optimiser sees only the sign of the images' gradient.
    noise : float
        Standard deviation of the noise that every step adds, in learning rates.
    decode : callable, optional
        From the optimised variable, of the images' shape, to normalised images,
        differentiable. The variable is then not boxed.
    decay : float
        Weight of half the variable's squared norm.
    evidence : sequence of Prior
        What else the update tells of the images: pulls with the explanation, not
        against it as `balance` has it, and does not enter the loss that is kept.
    report : Report, optional
    options : mapping
        The attack's constants, for the result.

    Raises
    ------
    AttackError
        If the loss is no longer finite.
    """
    run = Run(attack, explanation, observation, budget, report, options)
    knowledge, device = explanation.knowledge, torch.device(budget.device)
    mean, std = run.mean, run.std
    low, high = -mean / std, (1 - mean) / std
    generator = torch.Generator(device).manual_seed(budget.seed)
    start = explanation.start
    if start is None or decode:
        shape = (explanation.copies * observation.num_examples, *knowledge.image_shape)
        start = torch.randn(shape, generator=generator, device=device)
    else:
        lr = _NEAR * lr
    variable = (start if decode else start.clamp(low, high)).requires_grad_()
    unknowns = [unknown.value for unknown in explanation.unknowns]
    groups: list[dict[str, object]] = [
        # Adam's weight decay is the gradient of half the square.
        {"params": [variable], "lr": lr, "peak": lr, "weight_decay": decay}
    ]
    groups += [{"params": [u.value], "lr": u.lr, "peak": u.lr} for u in explanation.unknowns]
    optimizer = torch.optim.Adam(groups)
    pairs = explanation.exchanges()
    to_restart = explanation.restart > 0
    for iteration, progress in enumerate(run.iterations()):
        if to_restart and progress >= explanation.restart:
            optimizer.state.clear()  # moments of what was matched before
            to_restart = False
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(_since_restart(progress, explanation.restart))
        with run.counted(progress):
            x = decode(variable) if decode else variable
            matching = explanation(x, progress)
            told = sum((tells(x * std + mean, progress) for tells in evidence), start=matching)
            # Fingerprints are matched without what a model draws behind them: a slope of zero.
            slope, *slopes = torch.autograd.grad(
                told, [x, *unknowns], allow_unused=True, materialize_grads=True
            )
            pull = _pull(priors, x, mean, std, progress)
            if balance:
                pull = pull * balance(progress) * _sizes(slope) / _sizes(pull)
            (gradient,) = torch.autograd.grad(x, variable, slope + pull)
            order = None
            if pairs and iteration % _LOOK == 0:
                pair = pairs[iteration // _LOOK % len(pairs)]
                order = _better_order(explanation, x.detach(), progress, matching, pair)
        variable.grad = gradient.sign() if signed else gradient
        for fitted, part in zip(explanation.unknowns, slopes, strict=True):
            pulled = fitted.prior and torch.autograd.grad(fitted.prior(fitted.value), fitted.value)
            fitted.value.grad = part + pulled[0] if pulled else part
        pace = explanation.pace()
        before = variable if pace is None else variable.detach().clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if noise:
                drawn = torch.randn(variable.shape, generator=generator, device=device)
                variable.add_(drawn, alpha=noise * optimizer.param_groups[0]["lr"])
            if pace is not None:
                variable.copy_(torch.lerp(before, variable, pace.view(-1, 1, 1, 1)))
            if decode is None:
                variable.clamp_(low, high)
            for fitted in explanation.unknowns:
                fitted.value.clamp_(fitted.low, fitted.high)
            if order is not None:
                kept = optimizer.state[variable]
                for rows in (variable, kept["exp_avg"], kept["exp_avg_sq"]):
                    rows.copy_(rows[order])
        run.note(matching)
    with torch.no_grad():
        return run.found(decode(variable) if decode else variable)


@torch.no_grad()
def _better_order(
    explanation: Explanation, x: Tensor, progress: float, matching: Tensor, pair: tuple[int, int]
) -> Tensor:
    """Return the order of images x, with a pair exchanged if that explains the update as well.

    The other images have adapted to where the pair is, so that the right order may look a little
    worse at first; a wrong one does not last. How much worse falls to 0 by the end. The choice is
    made on the device, so that nothing waits for it.
    """
    order = torch.arange(len(x))
    other = order.clone()
    other[list(pair)] = order[list(reversed(pair))]
    order, other = order.to(x.device), other.to(x.device)
    as_good = (1 + _AS_GOOD * (1 - progress)) * matching
    return torch.where(explanation(x[other], progress) < as_good, other, order)


class Run:
    """One run of an attack: its budget, how far it is, and what it costs.

    Parameters
    ----------
    attack, explanation, observation, budget, report, options
        See `optimise`.

    Attributes
    ----------
    mean, std : Tensor, shape (C, 1, 1)
        The client's normalisation.
    """

    def __init__(
        self,
        attack: str,
        explanation: Explanation,
        observation: Observation,
        budget: Budget,
        report: Report | None,
        options: Mapping[str, float | int | str],
    ) -> None:
        self._attack, self._options = attack, options
        self._explanation, self._observation = explanation, observation
        self._budget, self._report = budget, report
        device = torch.device(budget.device)
        scale = (explanation.knowledge.mean, explanation.knowledge.std)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in scale)
        self._losses = torch.zeros(budget.iterations, device=device)
        self._counter = _FlopCounter()
        self._memory = _PeakMemory(device)
        self._began = self._reported = time.monotonic()
        self._stop_reason, self._done = "iterations", 0

    def iterations(self) -> Iterator[float]:
        """Yield the progress in [0, 1] at the start of every iteration that the budget holds."""
        total, seconds = self._budget.iterations, self._budget.seconds
        for iteration in range(total):
            progress, spent = iteration / total, time.monotonic() - self._began
            if seconds and spent > seconds and iteration:
                self._stop_reason = "seconds"
                return
            # The schedules are to end when the time does.
            yield max(progress, min(spent / seconds, 1.0)) if seconds else progress

    def counted(self, progress: float) -> AbstractContextManager[object]:
        """Return a context for an iteration's work on the explanation and the priors."""
        return self._counter.watch(progress >= self._explanation.restart)

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

    def found(self, x: Tensor) -> Reconstruction:
        """Return what the explanation makes of the last candidates, and the costs of all.

        Parameters
        ----------
        x : Tensor, shape (copies * N, C, H, W)
            Normalised images.

        Raises
        ------
        AttackError
            If a loss was not finite.
        """
        self._check_finite(self._losses[: self._done])
        history = tuple(self._losses[: self._done].tolist())
        explanation = self._explanation
        knowledge, images = explanation.knowledge, explanation.found_images(x).detach()
        return Reconstruction(
            attack=self._attack,
            explanation="; ".join([explanation.reason, *knowledge.inferred]),
            images=(images * self.std + self.mean).clamp(0, 1).cpu(),
            labels=explanation.found_labels(),
            labels_source=knowledge.labels_source,
            losses=history,
            iterations=self._done,
            seconds=time.monotonic() - self._began,
            peak_memory=self._memory.above_start(),
            flops=self._counter.total(),
            stop_reason=self._stop_reason,
            options=self._options,
            diagnosis=diagnose(
                self._observation, knowledge, history, explanation.position(), explanation.at_truth
            ),
        )

    def _check_finite(self, losses: Tensor) -> None:
        if not torch.isfinite(losses).all():
            raise AttackError(f"the matching loss is not finite by iteration {self._done}")


def _since_restart(progress: float, restart: float) -> float:
    """Return the share done of that part of an attack which `restart` divides it into."""
    if progress < restart:
        return progress / restart
    return (progress - restart) / (1 - restart)


def _pull(priors: Sequence[Prior], x: Tensor, mean: Tensor, std: Tensor, progress: float) -> Tensor:
    """Return the gradient of the priors' sum in x, of x's shape."""
    if not priors:
        return torch.zeros_like(x)
    images = (x.detach() * std + mean).requires_grad_()
    penalty = torch.stack([prior(images, progress) for prior in priors]).sum()
    return torch.autograd.grad(penalty, images)[0] * std


def _sizes(gradient: Tensor) -> Tensor:
    """Return the norm of a gradient (N, C, H, W) by image, shape (N, 1, 1, 1), above 0."""
    return (gradient.square().sum((1, 2, 3), keepdim=True) + 1e-30).sqrt()


class _FlopCounter(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas.

    Counting is slow, so a few iterations stand for all of the same part of the
    attack: enough of them for what is done in every m-th alone.

    `torch.utils.flop_counter.FlopCounterMode` also tracks modules, by hooks that
    do not stand gradients taken while another one is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops, self._iterations, self._part = [0, 0], [0, 0], 0

    def watch(self, restarted: bool) -> AbstractContextManager[object]:
        """Return a context for one iteration, before or after the explanation's restart."""
        self._part = int(restarted)
        self._iterations[self._part] += 1
        return self if self._iterations[self._part] <= _COUNTED else nullcontext()

    def total(self) -> int:
        """Return the operations of all iterations."""
        parts = zip(self._flops, self._iterations, strict=True)
        return sum(flops * count // min(count, _COUNTED) for flops, count in parts if count)

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

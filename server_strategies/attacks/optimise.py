"""The one loop of every attack that follows a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_app.protocol import Budget, Observation, Reconstruction
from server_strategies.attacks.accounting import Report, Run
from server_strategies.attacks.matching.base import MatchingObjective

Prior = Callable[[Tensor, float], Tensor]
"""Penalty, shape (), of images in [0, 1] (N, C, H, W) at a progress in [0, 1]."""

_NEAR = 0.01  # share of the learning rate where the start is nearly a solution already
EXCHANGES = 3  # iterations from one trial of a reassignment to the next
_AS_GOOD = 0.05  # share by which a reassignment may raise the loss, at the start


def cosine_schedule(progress: float, last: float = 0.02) -> float:
    """Return the learning rate's factor, which falls from 1 to `last` by a half cosine."""
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))


def step_schedule(progress: float) -> float:
    """Return the learning rate's factor: x0.1 at 3/8, 5/8 and 7/8 (Geiping et al., 2020)."""
    return 0.1 ** sum(progress >= milestone for milestone in (3 / 8, 5 / 8, 7 / 8))


@dataclass(frozen=True)
class Parts:
    """What an attack consists of.

    Attributes
    ----------
    matching : MatchingObjective
        Gives the matching loss of normalised images.
    priors : sequence of Prior
        Image priors.
    lr : float
        Peak learning rate on normalised pixels.
    schedule : callable
        Factor of every learning rate by progress in [0, 1).
    prior_strength : callable, optional
        By progress, the ratio of gradient norms, priors to matching, for each image. Images
        of the last steps of a trajectory enter the update a hundred times less than those of
        the first: at equal weights the priors would decide them alone. None: as the losses
        are.
    terms : sequence of Prior
        Additional matching terms: their gradient counts with the matching's, not against
        it as `prior_strength` has it, and they do not enter the loss that is kept.
    signed : bool
        Whether the optimiser sees only the sign of the images' gradient.
    noise : float
        Standard deviation of the noise that every step adds, in learning rates.
    decode : callable, optional
        From the optimised variable, of the images' shape, to normalised images,
        differentiable. The variable is then not boxed.
    decay : float
        Weight of half the variable's squared norm.
    population : int
        0: the search follows the gradient, see `optimise`; otherwise the candidates of
        a generation, see `evolve`.
    search : callable, optional
        The attack's own search, called as `optimise`; None: the one that suits the others.
    others : Parts, optional
        What images are searched with that `gauss_newton` can't decode; None: the same.
    chosen : mapping
        Constants that the attack chose itself, for the log.
    """

    matching: MatchingObjective
    priors: Sequence[Prior] = ()
    lr: float = 0.1
    schedule: Callable[[float], float] = cosine_schedule
    prior_strength: Callable[[float], float] | None = None
    terms: Sequence[Prior] = ()
    signed: bool = False
    noise: float = 0.0
    decode: Callable[[Tensor], Tensor] | None = None
    decay: float = 0.0
    population: int = 0
    search: Callable[..., Reconstruction] | None = None
    others: Parts | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)


def optimise(
    parts: Parts, observation: Observation, budget: Budget, report: Report | None = None
) -> Reconstruction:
    """Minimise ``matching(x) + sum of priors`` over images.

    Adam on normalised pixels from N(0, I), or from the matching's start, near
    which it stays, boxed to those of images in [0, 1] after every step, with the
    matching's own unknowns optimised jointly and boxed to theirs. Every few iterations
    two images that may be assigned to each other's local step are swapped, if the loss
    is then as low. The result is what the matching makes of the last iterate: nothing
    is chosen by its likeness to the ground truth.

    Parameters
    ----------
    parts : Parts
    observation : Observation
        For the diagnosis.
    budget : Budget
    report : Report, optional

    Raises
    ------
    AttackError
        If the loss is no longer finite.
    """
    objective, decode, lr = parts.matching, parts.decode, parts.lr
    run = Run(objective, observation, budget, report)
    knowledge, device = objective.knowledge, torch.device(budget.device)
    mean, std = run.mean, run.std
    low, high = -mean / std, (1 - mean) / std
    generator = torch.Generator(device).manual_seed(budget.seed)
    start = objective.start
    if start is None or decode:
        shape = (objective.candidates * observation.num_examples, *knowledge.image_shape)
        start = torch.randn(shape, generator=generator, device=device)
    elif objective.near_start:
        lr = _NEAR * lr
    variable = (start if decode else start.clamp(low, high)).requires_grad_()
    unknowns = [unknown.value for unknown in objective.unknowns]
    groups: list[dict[str, object]] = [
        # Adam's weight decay is the gradient of half the square.
        {"params": [variable], "lr": lr, "peak": lr, "weight_decay": parts.decay}
    ]
    groups += [{"params": [u.value], "lr": u.lr, "peak": u.lr} for u in objective.unknowns]
    optimizer = torch.optim.Adam(groups)
    pairs = objective.reassignments()
    to_restart = objective.restart > 0
    for iteration, progress in enumerate(run.iterations()):
        if to_restart and progress >= objective.restart:
            optimizer.state.clear()  # moments of what was matched before
            to_restart = False
        factor = parts.schedule(_since_restart(progress, objective.restart))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        with run.counted(progress):
            x = decode(variable) if decode else variable
            matching = objective(x, progress)
            matched = sum((term(x * std + mean, progress) for term in parts.terms), start=matching)
            # Fingerprints do not depend on the noise of layers after theirs: its gradient is zero.
            slope, *slopes = torch.autograd.grad(
                matched, [x, *unknowns], allow_unused=True, materialize_grads=True
            )
            against = _prior_gradient(parts.priors, x, mean, std, progress)
            if parts.prior_strength:
                against = against * parts.prior_strength(progress) * _norms(slope) / _norms(against)
            (gradient,) = torch.autograd.grad(x, variable, slope + against)
            order = None
            if pairs and iteration % EXCHANGES == 0:
                pair = pairs[iteration // EXCHANGES % len(pairs)]
                order = _better_order(objective, x.detach(), progress, matching, pair)
        variable.grad = gradient.sign() if parts.signed else gradient
        for fitted, part in zip(objective.unknowns, slopes, strict=True):
            fitted.value.grad = part
            if fitted.prior:
                penalty = fitted.prior(fitted.value)
                fitted.value.grad = part + torch.autograd.grad(penalty, fitted.value)[0]
        pace = objective.pace()
        before = variable if pace is None else variable.detach().clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if parts.noise:
                drawn = torch.randn(variable.shape, generator=generator, device=device)
                variable.add_(drawn, alpha=parts.noise * optimizer.param_groups[0]["lr"])
            if pace is not None:
                variable.copy_(torch.lerp(before, variable, pace.view(-1, 1, 1, 1)))
            if decode is None:
                variable.clamp_(low, high)
            for fitted in objective.unknowns:
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
    objective: MatchingObjective,
    x: Tensor,
    progress: float,
    matching: Tensor,
    pair: tuple[int, int],
) -> Tensor:
    """Return the order of images x, with a pair swapped if that matches the update as well.

    The objective's labels are swapped with them.

    The other images have adapted to where the pair is, so that the right order may look a little
    worse at first; a wrong one does not last. How much worse falls to 0 by the end. The choice is
    made on the device, so that nothing waits for it.
    """
    order = torch.arange(len(x))
    other = order.clone()
    other[list(pair)] = order[list(reversed(pair))]
    # Not waiting: the search on a GPU never does.
    order, other = (each.to(x.device, non_blocking=True) for each in (order, other))
    as_good = (1 + _AS_GOOD * (1 - progress)) * matching
    labels = objective.labels
    objective.labels = labels[other]
    order = torch.where(objective(x[other], progress) < as_good, other, order)
    objective.labels = labels[order]
    return order


def _since_restart(progress: float, restart: float) -> float:
    """Return the share done of that part of an attack which `restart` divides it into."""
    if progress < restart:
        return progress / restart
    return (progress - restart) / (1 - restart)


def _prior_gradient(
    priors: Sequence[Prior], x: Tensor, mean: Tensor, std: Tensor, progress: float
) -> Tensor:
    """Return the gradient of the priors' sum in x, of x's shape."""
    if not priors:
        return torch.zeros_like(x)
    return prior_slope(priors, x.detach() * std + mean, progress) * std


def prior_slope(priors: Sequence[Prior], images: Tensor, progress: float) -> Tensor:
    """Return the gradient of the priors' sum in images in [0, 1], of their shape (N, C, H, W)."""
    images = images.detach().requires_grad_()
    penalty = torch.stack([prior(images, progress) for prior in priors]).sum()
    return torch.autograd.grad(penalty, images)[0]


def _norms(gradient: Tensor) -> Tensor:
    """Return the norm of a gradient (N, C, H, W) by image, shape (N, 1, 1, 1), above 0."""
    return (gradient.square().sum((1, 2, 3), keepdim=True) + 1e-30).sqrt()

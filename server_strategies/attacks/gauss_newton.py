"""Search by least squares: Gauss-Newton with gates held, damped towards the prior's image.

Features of a ReLU network are piecewise linear in the image. With the gates held, the
image follows from them by linear least squares, which conjugate gradients solve with
first derivatives alone. Where features leave an image undetermined, the image prior
decides: each step is pulled towards what the prior makes of the last image, the less the
better the features fit (Levenberg-Marquardt; plug-and-play priors, Venkatakrishnan et
al., 2013).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fl_app.protocol import Budget, Observation, Reconstruction
from server_strategies.attacks.accounting import Report, Run
from server_strategies.attacks.matching.low_rank.convolution import Convolution, Reached
from server_strategies.attacks.matching.relu_smoothing import soft_gates
from server_strategies.attacks.optimise import Parts, optimise, prior_slope

_ONLY_SOME = 0.6  # share of the seconds for decoding, where other images are to be searched for
_SOLVES = 20  # conjugate gradients a step
_FEW, _MANY = 0.2, 1.5  # factors of their number in a second cycle, first and last
_STUCK = 3e-4  # misfit above which an image starts again
_RENEW = 3  # steps after which the weights in front of the layer are simulated again
_GATES = (0.3, 0.03)  # width of the gates, first and last
_PULL = 1000.0  # weight of the prior's image, in misfits and prior strengths
_MOST_PULL = 0.1
_DAMPING = (1e-2, 1e-7, 10.0)  # first, least and most damping
_EASED, _RAISED = 1 / 3, 4.0  # factors of the damping after a step that was taken, or not
_MATCHED = 0.1  # matching loss up to which the images of a search are taken
_WEIGHT = 100.0  # of the convolution's equations in a joint step, in misfits
_JOINT_DAMPING = 1e-6  # their first damping
_WORSE = 1.2  # factor of the least cost from which a joint step is taken back
_JOINT_PULL = 1e-4  # of the prior's image there
_EXACT = 1e-6  # misfit at which the search ends
_ANSWERED = 1e-4  # square of a feature's answer to a pixel, from which it tells the pixel

Linear = Callable[[Tensor], Tensor]


@runtime_checkable
class Decodable(Protocol):
    """A matching objective that knows features of images, by local step.

    Attributes
    ----------
    found : Tensor of bool, shape (N,)
        Which images it knows features of.
    decoding_steps : int
        Gauss-Newton steps that decode them, in all cycles.
    joint_steps : int
        Steps that decode all of them together, where there is a `convolution`.
    """

    found: Tensor
    decoding_steps: int
    joint_steps: int

    def groups(self) -> list[tuple[int, Tensor]]:
        """Return local steps, and the images of each whose features are known."""
        ...

    def features(self, step: int, images: Tensor, x: Tensor) -> Tensor:
        """Return the features of some images, x (B, C, H, W), at a step's weights, (B, D)."""
        ...

    def wanted(self, step: int, images: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the known features of a step's images, and how much each counts, (B, D) both.

        Parameters
        ----------
        step : int
        images : Tensor of int64, shape (B,)
            Some of the step's.
        given : Tensor, shape (B, D)
            Those of the images so far.
        """
        ...

    def renew(self, x: Tensor) -> None:
        """Simulate the weights of all steps with normalised images (N, C, H, W)."""
        ...

    @property
    def convolution(self) -> Convolution | None:
        """What gives linear equations of all images together; None: there are none."""
        ...

    def reached(self, step: int, x: Tensor) -> Reached:
        """Return the features of normalised images, and what the convolution has of them."""
        ...


def decodes(matching: object) -> bool:
    """Return whether a matching is `Decodable`, and knows the features of some image."""
    return isinstance(matching, Decodable) and bool(matching.found.any())


def gauss_newton(
    parts: Parts, observation: Observation, budget: Budget, report: Report | None = None
) -> Reconstruction:
    """Decode the images of exact features; the others follow by `optimise`.

    Minimises by image ``|f(x) - a|^2 / |a|^2 + pull |x - p(x)|^2 / n``, with f linear
    around the last image, n an image's numbers, and p(x) a step along the priors' gradient
    of the length that takes a mean square of weight 1 to its minimum: for a denoiser its
    result. The pull is a multiple of the misfit. A step that does not lower this cost is
    not taken, and the next is damped more. It starts at the mean colour. Where the matching
    has a `convolution`, the rest of the budget decodes all images together.

    Parameters
    ----------
    parts : Parts
        Its matching is `Decodable`. `lr`, `schedule`, `signed`, `noise` and `decay` do
        not count while images are decoded.
    observation, budget, report
        See `optimise`.

    Raises
    ------
    AttackError
        If the loss is no longer finite.
    """
    matching, began = parts.matching, time.monotonic()
    assert isinstance(matching, Decodable)
    steps = min(budget.iterations, matching.decoding_steps)
    # In few steps no image can be told to be stuck.
    cycles = 2 if steps == matching.decoding_steps else 1
    all_found, joint = bool(matching.found.all()), matching.convolution is not None
    seconds = budget.seconds * (1.0 if all_found and not joint else _ONLY_SOME)
    # The misfit of features is no matching loss of the update: no threshold is meant for it.
    decoding = replace(budget, iterations=steps, seconds=seconds, recovery_threshold=0.0)
    run = Run(matching, observation, decoding, report, counted=1)
    scale = (run.mean, run.std)
    low, high = -run.mean / run.std, (1 - run.mean) / run.std
    shape = (observation.num_examples, *matching.knowledge.image_shape)
    x = torch.zeros(shape, device=run.mean.device)
    state = _Decoding(matching, x, (low, high))
    matching.renew(x)
    for number, progress in enumerate(run.iterations()):
        cycle, within = divmod(progress * cycles, 1.0)
        if cycle > state.cycle and not state.again():
            run.end("decoded")
            break
        if number and number % _RENEW == 0:
            matching.renew(state.best())
        strength = parts.prior_strength(within) if parts.prior_strength else 0.0
        with run.counted(progress):
            target = _prior_image(parts, state.x, scale, within)
            state.step(target, _PULL * strength, within)
        run.note(state.misfit[matching.found].mean())
        if number % _RENEW == 0 and bool(state.misfit[matching.found].max() < _EXACT):
            run.end("exact")
            break
    x = state.best()
    matching.renew(x)
    found = replace(run.found(x), determined=determined(matching, x))
    if budget.iterations <= steps:
        return found
    rest = replace(budget, iterations=budget.iterations - steps)
    if budget.seconds:
        spent = time.monotonic() - began
        rest = replace(rest, seconds=max(budget.seconds - spent, 1e-3))
    if all_found:
        if not joint or found.stop_reason == "exact":
            return found
        rest = replace(rest, iterations=min(rest.iterations, matching.joint_steps))
        return _added(found, _refined(parts, observation, rest, report, x))
    # The others have to be searched for, from noise as always.
    generator = torch.Generator(x.device).manual_seed(budget.seed)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    matching.start = torch.where(_each(matching.found, x), x, noise)
    matching.near_start = False
    others = optimise(parts.others or parts, observation, rest, report)
    if others.losses[-1] > _MATCHED:
        # What does not match the update is no better than the mean colour, and often worse.
        kept = _each(matching.found.cpu(), others.images)
        others = replace(others, images=torch.where(kept, others.images, found.images))
    return _added(found, others)


def _added(first: Reconstruction, second: Reconstruction) -> Reconstruction:
    """Return the second search's result with the costs of both."""
    return replace(
        second,
        losses=first.losses + second.losses,
        iterations=first.iterations + second.iterations,
        seconds=first.seconds + second.seconds,
        peak_memory=max(first.peak_memory, second.peak_memory),
        flops=first.flops + second.flops,
        determined=first.determined,
    )


def determined(matching: Decodable, x: Tensor) -> tuple[float | None, ...]:
    """Return by image how much of it its features determine well, in [0, 1].

    The rest hangs on weak answers, which noise hides, and on the prior.

    With J the derivative of the known features in the image, ``tr((J'J + r)^-1 J'J) / n`` is the
    share of the directions of an image's n numbers to which the features answer. r is small
    against the mean square of a feature for a pixel: an answer of a hundredth counts as half.
    The trace is estimated by one random vector of signs (Hutchinson, 1990).

    Parameters
    ----------
    matching : Decodable
        Renewed at x.
    x : Tensor, shape (N, C, H, W)
        Normalised images. None stands for one that has no known features.
    """
    shares: list[float | None] = [None] * len(x)
    generator = torch.Generator(x.device).manual_seed(0)
    for step, images in matching.groups():
        drawn = torch.randint(2, x[images].shape, generator=generator, device=x.device)
        share = _answered(matching, step, images, x[images], 2.0 * drawn - 1).clamp(0, 1)
        for image, value in zip(images.tolist(), share.tolist(), strict=True):
            shares[image] = value
    return tuple(shares)


def _answered(matching: Decodable, step: int, images: Tensor, x: Tensor, signs: Tensor) -> Tensor:
    """Return the share of `determined` of some images of a step, by random signs of x's shape."""
    with torch.no_grad():
        wanted, weight = matching.wanted(step, images, matching.features(step, images, x))
    root = weight.sqrt()
    ridge = _ANSWERED * _each((root * wanted).square().sum(1) / x[0].numel(), x)
    _, along, back = _linear(lambda z: root * matching.features(step, images, z), x)
    seen = _solve(lambda v: back(along(v)) + ridge * v, back(along(signs)), _SOLVES)
    return (signs * seen).flatten(1).mean(1)


class _Decoding:
    """The images of a search by least squares, and how far each is.

    In a second cycle images that are stuck start again, with fewer conjugate gradients at
    first: they are in a local minimum of wrong gates, and another way leads elsewhere. Of
    both results the one that fits better is kept.
    """

    def __init__(self, matching: Decodable, x: Tensor, box: tuple[Tensor, Tensor]) -> None:
        self.matching, self.x, self.box = matching, x, box
        self.groups = matching.groups()
        self.damping = torch.full((len(x),), _DAMPING[0], device=x.device)
        self.misfit = torch.full((len(x),), torch.inf, device=x.device)
        self.cycle = 0
        self.kept, self.kept_misfit = x, self.misfit

    def best(self) -> Tensor:
        """Return of each image the result that fits best so far."""
        return torch.where(_each(self.misfit <= self.kept_misfit, self.x), self.x, self.kept)

    def again(self) -> bool:
        """Start the images again that are stuck; return whether there are any."""
        stuck = self.matching.found & (self.misfit > _STUCK)
        self.kept, self.kept_misfit = self.best(), torch.minimum(self.misfit, self.kept_misfit)
        self.x = torch.where(_each(stuck, self.x), 0.0, self.x)
        self.damping[stuck] = _DAMPING[0]
        self.cycle += 1
        chosen = [(step, images[stuck[images]]) for step, images in self.groups]
        self.groups = [(step, images) for step, images in chosen if len(images)]
        return bool(self.groups)

    def step(self, target: Tensor, pull: float, progress: float) -> None:
        """Make one step of all images towards their features and a target (N, C, H, W)."""
        width = _GATES[0] * (_GATES[1] / _GATES[0]) ** progress
        solves = _SOLVES
        if self.cycle:
            solves = round(_SOLVES * (_FEW + (_MANY - _FEW) * progress))
        x, damping, misfit = self.x.clone(), self.damping.clone(), self.misfit.clone()
        for step, images in self.groups:
            misfit[images], x[images], damping[images] = _stepped(
                self.matching, step, images, x[images], target[images],
                damping[images], pull, width, solves, self.box,
            )  # fmt: skip
        self.x, self.damping, self.misfit = x, damping, misfit


def _prior_image(parts: Parts, x: Tensor, scale: tuple[Tensor, Tensor], progress: float) -> Tensor:
    """Return p(x), of normalised images (N, C, H, W)."""
    mean, std = scale
    if not parts.priors:
        return x
    images = x * std + mean
    slope = prior_slope(parts.priors, images, progress)
    # Of a mean over all numbers of squares on [-1, 1].
    moved = (images - slope * images.numel() / 8).clamp(0, 1)
    return (moved - mean) / std


def _stepped(
    matching: Decodable,
    step: int,
    images: Tensor,
    x: Tensor,
    target: Tensor,
    damping: Tensor,
    pull: float,
    width: float,
    solves: int,
    box: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return misfit, images and damping after one step, of some images of one local step."""
    with torch.no_grad():
        wanted, weight = matching.wanted(step, images, matching.features(step, images, x))
    root = weight.sqrt()
    wanted = root * wanted
    square = wanted.square().sum(1)
    unit = _each(square / x[0].numel(), x)  # of squared features, for a squared pixel
    with soft_gates(width):
        given, along, back = _linear(lambda z: root * matching.features(step, images, z), x)
    misfit = (given - wanted).square().sum(1) / square
    share = (pull * misfit).clamp(max=_MOST_PULL)
    downhill = back(wanted - given) - _each(share, x) * unit * (x - target)
    ridge = _each(share + damping, x) * unit
    # A pixel at its bound that would leave it stays there, or clipping would spoil the step.
    stays = ((x <= box[0]) & (downhill < 0)) | ((x >= box[1]) & (downhill > 0))
    free = (~stays).to(x)
    moved = _solve(lambda v: free * back(along(v)) + ridge * v, free * downhill, solves)
    new = torch.minimum(torch.maximum(x + moved, box[0]), box[1])
    with torch.no_grad():
        left = (root * matching.features(step, images, new) - wanted).square().sum(1) / square
    before = misfit + share * (x - target).square().flatten(1).mean(1)
    after = left + share * (new - target).square().flatten(1).mean(1)
    taken = after < before
    x = torch.where(_each(taken, x), new, x)
    damping = (damping * torch.where(taken, _EASED, _RAISED)).clamp(_DAMPING[1], _DAMPING[2])
    return torch.where(taken, left, misfit), x, damping


def _linear(function: Linear, x: Tensor) -> tuple[Tensor, Linear, Linear]:
    """Return a function's value at x, and products with its derivative and its transpose."""
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    value = function(x)
    # The pull-back is linear in its argument: its own derivative is the push-forward.
    probe = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(value, x, probe, create_graph=True)

    def along(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, probe, v, retain_graph=True)[0]

    def back(v: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, v, retain_graph=True)[0]

    return value.detach(), along, back


def _refined(
    parts: Parts, observation: Observation, budget: Budget, report: Report | None, x: Tensor
) -> Reconstruction:
    """Decode all images together, from decoded ones (N, C, H, W); the best result counts."""
    matching = parts.matching
    assert isinstance(matching, Decodable)
    run = Run(matching, observation, budget, report, counted=1)
    scale = (run.mean, run.std)
    box = (-run.mean / run.std, (1 - run.mean) / run.std)
    best, least, damping = x, torch.inf, _JOINT_DAMPING
    matching.renew(x)
    for number, progress in enumerate(run.iterations()):
        if number and number % _RENEW == 0:
            matching.renew(best)
        with run.counted(progress):
            target = _prior_image(parts, x, scale, progress)
            new, misfit, cost = _joint_step(matching, x, target, damping, box)
        run.note(misfit.mean())
        if cost < least:
            best, least = x, cost
            damping = max(damping * _EASED, _DAMPING[1])
        if cost < _WORSE * least:
            x = new
        else:
            x, damping = best, min(damping * _RAISED, _DAMPING[2])
    matching.renew(best)
    return run.found(best)


def _joint_step(
    matching: Decodable, x: Tensor, target: Tensor, damping: float, box: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Return all images after one joint step, and the misfits and the residual before it.

    It minimises ``sum_n |f(x_n) - a_n|^2 / |a_n|^2 + w r' P r / |T|^2 + pull |x - p(x)|^2 / n``,
    with the residual r of the convolution's update T, and P the weighting that leaves out
    what unsure gates may change.

    Returns
    -------
    images : Tensor, shape (N, C, H, W)
    misfit : Tensor, shape (N,)
    cost : float
        The first two terms of what is minimised, before the step.
    """
    equations = matching.convolution
    assert equations is not None
    runs: list[tuple[Tensor, Linear, Linear]] = []
    values, wanted, inputs, outputs = [], [], [], []
    for step, images in matching.groups():
        kept: list[Tensor] = []

        def reached(z: Tensor, step: int = step, kept: list[Tensor] = kept) -> Tensor:
            run = matching.reached(step, z)
            kept[:] = run.inputs.detach(), run.outputs.detach()
            return torch.cat([run.features, _rows(run.inputs)], 1)

        with soft_gates(_GATES[1]):
            value, *products = _linear(reached, x[images])
        runs.append((images, products[0], products[1]))
        values.append(value[:, : -kept[0][0].numel()])
        wanted.append(matching.wanted(step, images, values[-1])[0])
        inputs.append(kept[0])
        outputs.append(kept[1])
    order = torch.cat([images for images, _, _ in runs]).argsort()
    a, f, y, z = (torch.cat(each)[order] for each in (wanted, values, inputs, outputs))
    square = a.square().sum(1, keepdim=True)
    misfit = (f - a).square().sum(1) / square[:, 0]
    gates = equations.gates(z, misfit)
    slopes = equations.slopes * gates
    residual = equations.update - equations.along(y, slopes)
    weighting = equations.across(y, gates)
    share = _WEIGHT / equations.square

    def along(v: Tensor) -> tuple[Tensor, Tensor]:
        pushed = torch.cat([push(v[images]) for images, push, _ in runs])[order]
        features, inner = pushed.split([a.shape[1], y[0].numel()], 1)
        return features, equations.along(_unrowed(inner, y), slopes)

    def back(features: Tensor, update: Tensor) -> Tensor:
        inner = equations.back(share * weighting(update), slopes, y.shape)
        both = torch.cat([features / square, _rows(inner)], 1)
        return torch.cat([pull(both[images]) for images, _, pull in runs])[order]

    pull = _JOINT_PULL / x[0].numel()
    ridge = pull + damping / x[0].numel()
    downhill = back(a - f, residual) - pull * (x - target)
    # To `_solve` all images are one.
    moved = _solve(lambda v: (back(*along(v[0])) + ridge * v[0])[None], downhill[None], _SOLVES)[0]
    new = torch.minimum(torch.maximum(x + moved, box[0]), box[1])
    # With many unsure gates P leaves little of the residual: misfits have to count as well.
    cost = misfit.sum() + share * (residual * weighting(residual)).sum()
    return new, misfit, cost.item()


def _solve(product: Linear, right: Tensor, solves: int) -> Tensor:
    """Return nearly the solution of a system for each image, by conjugate gradients from 0."""
    solution = torch.zeros_like(right)
    left, way = right.clone(), right.clone()
    size = left.square().flatten(1).sum(1)
    for _ in range(solves):
        image = product(way)
        length = size / ((way * image).flatten(1).sum(1) + 1e-30)
        solution += _each(length, way) * way
        left -= _each(length, way) * image
        new = left.square().flatten(1).sum(1)
        way = left + _each(new / (size + 1e-30), way) * way
        size = new
    return solution


def _rows(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) as rows, channels last: convolutions run faster with these."""
    return images.permute(0, 2, 3, 1).flatten(1)


def _unrowed(rows: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of `_rows`, of the images' shape."""
    count, channels, height, width = like.shape
    return rows.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def _each(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))

"""Explanations of a single local step: one gradient, at the weights that were sent.

With one step the optimiser's arithmetic can be inverted: from SGD's step follows
the gradient itself, from Adam's its size up to float rounding, and from any
sign-like step at least its signs. All three work from the client's mean step
``r = (w0 - w1) / lr``, see `mean_step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fl_app.protocol import Knowledge, LocalTraining, Observation
from server_strategies.attacks.matching.base import MatchingObjective
from server_strategies.attacks.matching.closed_form import image_of
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.distance import CosineDistance, Distance
from server_strategies.attacks.matching.gradient import constant_gradient_speeds, loss_gradient
from server_strategies.attacks.matching.trajectory import EPS


def mean_step(
    w0: Sequence[Tensor], w1: Sequence[Tensor], training: LocalTraining, num_steps: int
) -> list[Tensor]:
    """Return the client's mean step in units of its learning rate, weight decay removed.

    ``r = (w0 - w1) / (lr c) - decay w0``. c counts the gradients that the
    displacement is worth: K for K steps, more with momentum, which hands a
    gradient on to later steps. Exact for one step of SGD, Nesterov's included,
    and of AdamW; for several, to first order in lr. Adam's own decay sits inside
    its normalisation and stays in.

    Parameters
    ----------
    w0, w1 : sequence of Tensor
        Weights before and after.
    training : LocalTraining
    num_steps : int
        K.
    """
    unit, decay = step_units(training, num_steps)
    return [(before - after) / unit - decay * before for before, after in zip(w0, w1, strict=True)]


def step_units(training: LocalTraining, num_steps: int) -> tuple[float, float]:
    """Return lr c and the decay of `mean_step`."""
    worth = sum(constant_gradient_speeds(training, num_steps))
    decay = 0.0 if training.optimizer == "adam" else training.weight_decay
    return training.lr * worth, decay


class GradientMatch(MatchingObjective):
    """Cosine distance to the client's mean step, as a gradient at w0 (Geiping et al., 2020).

    ``1 - cos(r, g(w0, x))`` over all parameters as one vector. Zero at the truth
    for one step of SGD, with momentum or weight decay too; clipping scales the
    gradient, which a cosine does not see. Later steps and Adam's normalisation
    are ignored, as published attacks that match gradients do. Where the gradient
    gives the image away in closed form, see `image_of`, `start` holds it.

    Parameters
    ----------
    model, observation, knowledge, reason
        See `MatchingObjective`.
    distance : type of Distance
        Another than the cosine, which does see how long the gradient is.

    Raises
    ------
    ValueError
        If the update is zero.
    """

    name = "gradient"

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        knowledge: Knowledge,
        reason: str,
        distance: type[Distance] = CosineDistance,
    ) -> None:
        super().__init__(model, observation, knowledge, reason)
        self.measure = distance
        self.num_steps = len(self.batches)
        self._prepare(list(self.w0.values()), list(self.w1.values()), knowledge)
        for w in self.w0.values():  # where the candidates' gradient is taken
            w.requires_grad_()

    def _prepare(self, w0: list[Tensor], w1: list[Tensor], knowledge: Knowledge) -> None:
        """Derive from the weights what candidates are compared with."""
        target = mean_step(w0, w1, self.training, self.num_steps)
        update = [before - after for before, after in zip(w0, w1, strict=True)]
        known = consistent(update, knowledge.defense, rescale=self.measure is CosineDistance)
        if known:
            unit, decay = step_units(self.training, self.num_steps)
            known = known.in_units(unit, [decay * before for before in w0])
        self.distance = self.measure(target, known=known)
        whole = known is None or not (known.sigma or known.hidden)
        if self.training.optimizer == "sgd" and whole:
            self._start_from(target, knowledge.image_shape)

    def _start_from(self, gradient: list[Tensor], shape: tuple[int, int, int]) -> None:
        """Start from the one image that a gradient, NaN where it is not known, may hold."""
        if self.num_steps == 1 and len(self.labels) == 1:
            by_name = dict(zip(self.w0, gradient, strict=True))
            self.start = image_of(self.model, by_name, shape)

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the cosine distance, shape (), of normalised images (N, C, H, W)."""
        return self.distance(self._gradient(x))

    def _gradient(self, x: Tensor) -> list[Tensor]:
        noise = self.noise_of(0, x)
        return loss_gradient(self.model, self.w0, x, self.targets(), noise)


class EpsInversion(GradientMatch):
    """Cosine distance to the gradient that Adam's epsilon gives away.

    Adam's first step is ``r = g / (|g| + eps)``, so ``|g| = eps |r| / (1 - |r|)``:
    float32 keeps enough of ``1 - |r|``, about ``eps / |g|``. Coordinates where it
    is under three times its rounding error, see `_tolerance`, are left out on
    both sides, and those whose size a known defence hides. Noise, rounding and
    clipping of the update destroy it; `usable` says so beforehand.

    Parameters and attributes are `GradientMatch`'s.

    Raises
    ------
    ValueError
        If the update can't be inverted.
    """

    name = "inversion"

    def _prepare(self, w0: list[Tensor], w1: list[Tensor], knowledge: Knowledge) -> None:
        steps = mean_step(w0, w1, self.training, self.num_steps)
        tolerance = _tolerance(w0, w1, self.training.lr)
        usable, reason = _invertible(steps, tolerance, self.training, self.num_steps)
        if not usable:
            raise ValueError(f"the update can't be inverted: {reason}")
        masks = [1 - r.abs() >= t for r, t in zip(steps, tolerance, strict=True)]
        known = consistent([a - b for a, b in zip(w0, w1, strict=True)], knowledge.defense)
        if known:
            told = known.sizes_told(self.training.lr)
            masks = [m & size for m, size in zip(masks, told, strict=True)]
        target = [
            torch.where(m, EPS * r / (1 - r.abs()), 0) for r, m in zip(steps, masks, strict=True)
        ]
        if self.training.optimizer == "adam":
            target = [g - self.training.weight_decay * w for g, w in zip(target, w0, strict=True)]
        self.distance = self.measure(target, masks)
        masked = [torch.where(m, g, torch.nan) for g, m in zip(target, masks, strict=True)]
        self._start_from(masked, knowledge.image_shape)

    @staticmethod
    def usable(observation: Observation, training: LocalTraining) -> tuple[bool, str]:
        """Say whether an update can be inverted, and why.

        Parameters
        ----------
        observation : Observation
        training : LocalTraining

        Returns
        -------
        bool
        str
            The share of coordinates kept, or what stands against it.
        """
        names = observation.trained
        w0, w1 = [observation.w0[n] for n in names], [observation.w1[n] for n in names]
        num_steps = len(training.batches(observation.num_examples))
        steps = mean_step(w0, w1, training, num_steps)
        return _invertible(steps, _tolerance(w0, w1, training.lr), training, num_steps)


def _tolerance(w0: Sequence[Tensor], w1: Sequence[Tensor], lr: float) -> list[Tensor]:
    """Return three times the rounding error of ``r = (w0 - w1) / lr``, by coordinate.

    A weight is stored to half a unit in its last place, 6e-8 of it in float32;
    Adam's own arithmetic and the division add about five such units of r, near 1.
    """
    unit = [torch.finfo(w.dtype).eps / 2 for w in w0]
    return [
        3 * (u * torch.maximum(before.abs(), after.abs()) / lr + 5 * u)
        for u, before, after in zip(unit, w0, w1, strict=True)
    ]


def _invertible(
    steps: Sequence[Tensor], tolerance: Sequence[Tensor], training: LocalTraining, num_steps: int
) -> tuple[bool, str]:
    """Say whether Adam's steps can be inverted, and why; see `EpsInversion.usable`."""
    if training.optimizer == "sgd":
        return False, "the client uses sgd, whose step is its gradient already"
    if num_steps != 1:
        return False, f"the client makes {num_steps} local steps; allowed: 1"
    size = torch.cat([r.abs().flatten() for r in steps])
    error = torch.cat([t.flatten() for t in tolerance])
    moved = size > error
    if not moved.any():
        return False, "the update is zero"
    size, error = size[moved], error[moved]
    # Adam's first step is never longer than lr and reaches it wherever |g| >> eps.
    longer = (size > 1 + error).float().mean().item()
    if longer > 1e-3:
        return False, f"{longer:.0%} of its steps are longer than lr: noise or coarse rounding"
    longest = size.max().item()
    if longest < 0.999:
        return False, f"its longest step is {longest:.3g} lr: it was clipped or scaled down"
    kept = (1 - size >= error).float().mean().item()
    if kept < 0.01:
        return False, f"rounding leaves the gradient's size in {kept:.2%} of the coordinates"
    return True, f"rounding leaves the gradient's size in {kept:.0%} of the coordinates"


class SignMatch(GradientMatch):
    """Agreement of signs, for Adam and other steps that are nearly the sign of a gradient.

    ``1 - sum(r g) / (sum |r| |g| + sum over dead coordinates of |g|)``, in [0, 2],
    with r the mean step. Zero at the truth for one step. A dead coordinate did
    not move at all, so its gradient was zero: a candidate's counts there as if
    it had the wrong sign half the time; one that a known defence set to zero, whose
    move may have been a step's, does not count. For several steps of Adam it is a
    cheap initialiser.

    Parameters and attributes are `GradientMatch`'s.
    """

    name = "sign"

    def _prepare(self, w0: list[Tensor], w1: list[Tensor], knowledge: Knowledge) -> None:
        self.steps = mean_step(w0, w1, self.training, self.num_steps)
        if not any(r.any() for r in self.steps):
            raise ValueError("the update is zero: the client returned what it was sent")
        # Adam's decay is inside the sign: it belongs to a candidate's gradient too.
        inner = self.training.optimizer == "adam" and self.training.weight_decay
        self.decayed = [self.training.weight_decay * w for w in w0] if inner else None
        self.weights = []
        for r, t in zip(self.steps, _tolerance(w0, w1, self.training.lr), strict=True):
            self.weights.append(torch.where(r.abs() <= t, 1, r.abs()))
        known = consistent([a - b for a, b in zip(w0, w1, strict=True)], knowledge.defense)
        if known:
            unit, _ = step_units(self.training, self.num_steps)
            pieces = zip(self.weights, self.steps, known.sizes_told(unit), strict=True)
            self.weights = [torch.where(told, s, r.abs()) for s, r, told in pieces]

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the disagreement, shape (), of normalised images (N, C, H, W)."""
        gradient = self._gradient(x)
        if self.decayed:
            gradient = [g + d for g, d in zip(gradient, self.decayed, strict=True)]
        agreed = [(r * g).sum() for r, g in zip(self.steps, gradient, strict=True)]
        most = [(s * g.abs()).sum() for s, g in zip(self.weights, gradient, strict=True)]
        return 1 - torch.stack(agreed).sum() / (torch.stack(most).sum() + 1e-30)

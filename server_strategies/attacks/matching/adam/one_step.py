"""Matching a single step of Adam, or of any optimiser whose steps are nearly signs.

Adam's step hides the size of a gradient, but not completely: its epsilon and the
weights' rounding leave most of it. The signs are always left. Both objectives compare
with the client's mean step, see `mean_step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_app.protocol import LocalTraining, Observation
from server_strategies.attacks.matching.base import OF_A_GRADIENT
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.gradient_match import GradientMatch, mean_step, step_units
from server_strategies.attacks.matching.optimizers import EPS


class EpsInversion(GradientMatch):
    """Distance from the gradient that Adam's epsilon reveals.

    Adam's first step is ``r = g / (|g| + eps)``, so ``|g| = eps |r| / (1 - |r|)``:
    float32 keeps enough of ``1 - |r|``, about ``eps / |g|``. Coordinates where it
    is under three times its rounding error, see `_tolerance`, are masked in both
    vectors, and so are those whose size a known defence hides. Noise, rounding and
    clipping of the update make it impossible; `usable` says so beforehand.

    Parameters and attributes are `GradientMatch`'s.

    Raises
    ------
    ValueError
        If the update can't be inverted.
    """

    name = "inversion"

    def _prepare(self, w0: list[Tensor], w1: list[Tensor]) -> None:
        steps = mean_step(w0, w1, self.training, self.num_steps)
        tolerance = _tolerance(w0, w1, self.training.lr)
        usable, reason = _invertible(steps, tolerance, self.training, self.num_steps)
        if not usable:
            raise ValueError(f"the update can't be inverted: {reason}")
        masks = [1 - r.abs() >= t for r, t in zip(steps, tolerance, strict=True)]
        known = consistent([a - b for a, b in zip(w0, w1, strict=True)], self.knowledge.defense)
        if known:
            sizes = known.sizes_known(self.training.lr)
            masks = [m & size for m, size in zip(masks, sizes, strict=True)]
        target = [
            torch.where(m, EPS * r / (1 - r.abs()), 0) for r, m in zip(steps, masks, strict=True)
        ]
        if self.training.optimizer == "adam":
            target = [g - self.training.weight_decay * w for g, w in zip(target, w0, strict=True)]
        self.distance = self.measure(target, masks)
        masked = [torch.where(m, g, torch.nan) for g, m in zip(target, masks, strict=True)]
        self._start_from(masked)

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
            The share of coordinates kept, or what prevents it.
        """
        names = [name for name in observation.trained if training.trains(name)]
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
    beyond = training.beyond(*OF_A_GRADIENT)
    if beyond:
        return False, f"of Adam's plain step alone a gradient follows, and {beyond}"
    if num_steps != 1:
        return False, f"the client makes {num_steps} local steps; allowed: 1"
    size = torch.cat([r.abs().flatten() for r in steps])
    error = torch.cat([t.flatten() for t in tolerance])
    changed = size > error
    if not changed.any():
        return False, "the update is zero"
    size, error = size[changed], error[changed]
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
    with r the mean step. Zero at the ground truth for one step. A dead coordinate has
    no update, so its gradient was zero: a candidate's gradient there counts as if it
    had the wrong sign half the time. Coordinates that a known defence may have set to
    zero do not count. For several steps of Adam it is a cheap initialiser.

    Parameters and attributes are `GradientMatch`'s.
    """

    name = "sign"

    def _prepare(self, w0: list[Tensor], w1: list[Tensor]) -> None:
        self.steps = mean_step(w0, w1, self.training, self.num_steps)
        if not any(r.any() for r in self.steps):
            raise ValueError("the update is zero: the client returned what it was sent")
        # Adam's decay is inside the sign, so a candidate's gradient needs it too.
        inner = self.training.optimizer == "adam" and self.training.weight_decay
        self.decayed = [self.training.weight_decay * w for w in w0] if inner else None
        self.weights = []
        for r, t in zip(self.steps, _tolerance(w0, w1, self.training.lr), strict=True):
            self.weights.append(torch.where(r.abs() <= t, 1, r.abs()))
        known = consistent([a - b for a, b in zip(w0, w1, strict=True)], self.knowledge.defense)
        if known:
            unit, _ = step_units(self.training, self.num_steps)
            pieces = zip(self.weights, self.steps, known.sizes_known(unit), strict=True)
            self.weights = [torch.where(sized, s, r.abs()) for s, r, sized in pieces]

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the disagreement, shape (), of normalised images (N, C, H, W)."""
        gradient = self._gradient(x)
        if self.decayed:
            gradient = [g + d for g, d in zip(gradient, self.decayed, strict=True)]
        agreed = [(r * g).sum() for r, g in zip(self.steps, gradient, strict=True)]
        most = [(s * g.abs()).sum() for s, g in zip(self.weights, gradient, strict=True)]
        return 1 - torch.stack(agreed).sum() / (torch.stack(most).sum() + 1e-30)

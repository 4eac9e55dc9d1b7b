"""Matching the client's mean step as one gradient at the weights that were sent.

All objectives of a single gradient work from the client's mean step
``r = (w0 - w1) / lr``, see `mean_step`. For one step of SGD it is the gradient itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.base import OF_A_GRADIENT, MatchingObjective, Setting
from server_strategies.attacks.matching.closed_form import image_of
from server_strategies.attacks.matching.defended import consistent
from server_strategies.attacks.matching.distance import CosineDistance
from server_strategies.attacks.matching.gradient import constant_gradient_speeds, loss_gradient


def mean_step(
    w0: Sequence[Tensor], w1: Sequence[Tensor], training: LocalTraining, num_steps: int
) -> list[Tensor]:
    """Return the client's mean step in units of its learning rate, weight decay removed.

    ``r = (w0 - w1) / (lr c) - decay w0``. c counts the gradients that the
    displacement is worth: K for K steps, more with momentum, which applies a
    gradient again in later steps. Exact for one step of SGD, Nesterov's included,
    and of AdamW; for several, to first order in lr. Adam's own decay is inside
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
    """Distance of the gradient at w0 from the client's mean step (Geiping et al., 2020).

    By the cosine ``1 - cos(r, g(w0, x))`` over all parameters as one vector. Zero at
    the ground truth for one step of SGD, with momentum or weight decay too. Clipping
    scales the gradient, which a cosine does not see and other distances do. Later
    steps and Adam's normalisation are ignored, as in published attacks that match
    gradients. Where the gradient determines the image in closed form, see `image_of`,
    `start` holds it.

    Parameters are `MatchingObjective`'s.

    Raises
    ------
    ValueError
        If the update is zero.
    """

    name = "gradient"
    models = OF_A_GRADIENT

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.num_steps = len(self.batches)
        self.trained = [name for name in self.w0 if self.training.trains(name)]
        self._prepare(*([w[name] for name in self.trained] for w in (self.w0, self.w1)))
        for w in self.w0.values():  # where the candidates' gradient is taken
            w.requires_grad_()

    def _prepare(self, w0: list[Tensor], w1: list[Tensor]) -> None:
        """Derive from the weights what candidates are compared with."""
        target = mean_step(w0, w1, self.training, self.num_steps)
        update = [before - after for before, after in zip(w0, w1, strict=True)]
        rescale = self.measure is CosineDistance
        known = consistent(update, self.knowledge.defense, rescale=rescale)
        if known:
            unit, decay = step_units(self.training, self.num_steps)
            known = known.in_units(unit, [decay * before for before in w0])
        self.distance = self.measure(target, known=known)
        whole = known is None or not (known.sigma or known.hidden)
        if self.training.optimizer == "sgd" and whole:
            self._start_from(target)

    def _start_from(self, gradient: list[Tensor]) -> None:
        """Start from the image that a gradient of one image determines.

        The gradient is NaN where it is not known.
        """
        if self.num_steps == 1 and len(self.labels) == 1 and len(self.trained) == len(self.w0):
            by_name = dict(zip(self.w0, gradient, strict=True))
            self.start = image_of(self.model, by_name, self.knowledge.image_shape)

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the distance, shape (), of normalised images (N, C, H, W)."""
        return self.distance(self._gradient(x))

    def _gradient(self, x: Tensor) -> list[Tensor]:
        x, y = x[: self.used], self.targets()[: self.used]
        noise = self.noise_of(0, x)
        parts = loss_gradient(self.model, self.w0, x, y, self.training, noise)
        by_name = dict(zip(self.w0, parts, strict=True))
        return [by_name[name] for name in self.trained]

"""The matching objective by exact features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from server_strategies.attacks.matching.base import Setting
from server_strategies.attacks.matching.low_rank.convolution import (
    Convolution,
    Reached,
    last_convolution,
    reached,
)
from server_strategies.attacks.matching.low_rank.exact import ExactFeatures
from server_strategies.attacks.matching.low_rank.head import Weights
from server_strategies.attacks.matching.low_rank.spectrum import known_part
from server_strategies.attacks.matching.optimizers import Adam, Sgd
from server_strategies.attacks.matching.trajectory import Trajectory

_FINEST = 1e-6  # share of the features' square that the misfit counts as, at the least
_TRUSTED = 0.05  # misfit from which images are not used to simulate Adam
_SHORTEST = 1e-2  # least length of features that are scaled to 1, in lengths of a noise image's
_RENEW = 8  # calls after which the weights that features are taken at are simulated again


def nhwc(weights: Weights) -> Weights:
    """Return weights with convolutions' channels last, which small batches run faster with."""
    return {
        name: w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w
        for name, w in weights.items()
    }


class LowRank(Trajectory):
    """Images by the exact features that a linear layer's update gives away.

    ``sum_n |f(x_n; w_k) - a_n|^2 / |a_n|^2 / N`` over the images that were found, with
    f the model up to the layer, and w_k the weights before image n's own local step.
    It takes first derivatives alone, and is piecewise quadratic in the images of a ReLU
    network, see `gauss_newton`. Images that were not found follow from the trajectory,
    with the others held.

    The head's weights at every step are those of its replay. The weights in front of the
    layer are simulated with the images found so far. What the simulation leaves of the
    update is spread over the steps by how far each moves the weights, so that the last
    step ends at w1.

    Parameters
    ----------
    setting : Setting
    exact : ExactFeatures

    Attributes
    ----------
    found : Tensor of bool, shape (N,)
        Which images follow from exact features.
    """

    name = "low_rank"
    models = ("drop_last",)
    decoding_steps = 120
    joint_steps = 120

    def __init__(self, setting: Setting, exact: ExactFeatures) -> None:
        super().__init__(setting)
        self.layer, self.replay, self.scale = exact.layer, exact.replay, exact.scale
        device = self.labels.device
        count = sum(1 for _ in {place for batch in self.batches for place in batch})
        self.first = self._first_places(count)
        self.found = exact.found[self.first].to(device)
        self.labels = self._labels(count).to(device)
        self.unknowns = [unknown for unknown in self.unknowns if unknown.value.dim() != 2]
        by_step = self.knowledge.labels_level == "by-step"
        self.knowledge = replace(
            self.knowledge,
            labels=tuple(self.labels.tolist()),
            labels_source=self.knowledge.labels_source if by_step else "replay",
        )
        self.steps = self.groups()
        first = self.first.to(device)
        self.exact, self.spread = (
            part.to(device)[first] for part in (exact.features, exact.spread)
        )
        self.by_adam = self.training.optimizer != "sgd"
        self.lengths = torch.ones_like(self.exact[:, :1])
        if self.by_adam:
            self.lengths = self._known(self.exact, self.spread).norm(dim=1, keepdim=True)
            self.exact = self._known(self.exact, self.spread) / self.lengths
            self.spread = self.spread / self.lengths
            # A model without biases makes nothing at all of the mean colour, where decoding starts.
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(1, *self.knowledge.image_shape, generator=generator)
            of_noise = self._features(nhwc(self.w0), noise.to(self.exact))
            self.shortest = _SHORTEST * float(of_noise.norm())
        self.inwards = exact.replay.inwards.to(device)
        self.weights_at = self._interpolated()
        self.calls = 0

    def _first_places(self, count: int) -> Tensor:
        """Return each image's first place in the training."""
        places: dict[int, int] = {}
        flat = (image for batch in self.batches for image in batch)
        for place, image in enumerate(flat):
            places.setdefault(image, place)
        return torch.tensor([places[image] for image in range(count)])

    def _labels(self, count: int) -> Tensor:
        """Return the labels of all images; of those without a term what is left of the known."""
        replayed = [self.replay.labels[place] for place in self.first.tolist()]
        known = self.knowledge.labels or (0,) * count
        left = Counter(known) - Counter(label for label in replayed if label >= 0)
        others = iter([*left.elements(), *known])
        return torch.tensor([label if label >= 0 else next(others) for label in replayed])

    def groups(self) -> list[tuple[int, Tensor]]:
        """See `Decodable`; the local steps of the first pass."""
        steps: list[tuple[int, Tensor]] = []
        seen: set[int] = set()
        for step, batch in enumerate(self.batches):
            new = [image for image in batch if image not in seen and bool(self.found[image])]
            seen |= set(batch)
            if new:
                steps.append((step, torch.tensor(new, device=self.labels.device)))
        return steps

    def features(self, step: int, images: Tensor, x: Tensor) -> Tensor:
        """See `Decodable`.

        Adam's update gives features away but for their length, so those that are known are
        scaled to length 1.
        """
        features = self._features(nhwc(self.weights_at[step]), x)
        if not self.by_adam:
            return features
        known = self._known(features, self.spread[images])
        return known / known.norm(dim=1, keepdim=True).clamp_min(self.shortest)

    @staticmethod
    def _known(features: Tensor, spread: Tensor) -> Tensor:
        return torch.where(spread.isfinite(), features, 0)

    def wanted(self, step: int, images: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decodable`.

        Features count by ``1 / (1 + spread^2 / misfit)``, with the mean square misfit so far: at
        first all that are known alike.
        """
        exact, spread = self.exact[images], self.spread[images]
        known = spread.isfinite()
        misfit = torch.where(known, given - exact, 0).square().mean(1, keepdim=True)
        least = _FINEST * exact.square().mean(1, keepdim=True)
        return exact, (1 + spread.square() / torch.maximum(misfit, least)).reciprocal()

    @cached_property
    def convolution(self) -> Convolution | None:
        """See `Decodable`; with SGD, where every image was found, and is trained on once."""
        places = sum(len(batch) for batch in self.batches)
        if self.by_adam or not bool(self.found.all()) or places != len(self.found):
            return None
        worth = known_part(self.training, len(self.batches))
        return last_convolution(
            self.model,
            self.w0,
            {name: self._end(name) for name in self._body()},
            self.layer.name,
            self.knowledge.image_shape,
            self.exact,
            self._slopes_of_images(worth[1]),
            worth[0],
        )

    def _slopes_of_images(self, worth: Sequence[float]) -> Tensor:
        """Return by image what goes back from the head, as far as it enters the update."""
        by_place = [w for w, batch in zip(worth, self.batches, strict=True) for _ in batch]
        slopes = self.inwards * torch.tensor(by_place).to(self.inwards)[:, None]
        return slopes[self.first.to(slopes.device)]

    def reached(self, step: int, x: Tensor) -> Reached:
        """See `Decodable`."""
        return reached(self.model, nhwc(self.weights_at[step]), x, self.layer.name)

    def _features(self, weights: Weights, x: Tensor) -> Tensor:
        return reached(self.model, weights, x, self.layer.name).features

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the loss, shape (), of normalised images (N, C, H, W)."""
        x = x[self._order(x.detach())]
        if self.calls % _RENEW == 0:
            self.renew(x.detach())
        self.calls += 1
        misfits = []
        for step, images in self.steps:
            off = self.features(step, images, x[images]) - self.exact[images]
            misfits.append(off.square().sum(1) / self.exact[images].square().sum(1))
        misfit = torch.cat(misfits).sum() / len(x)
        if bool(self.found.all()):
            return misfit
        held = self.found.view(-1, 1, 1, 1)
        return misfit + super().__call__(torch.where(held, x.detach(), x), progress)

    @torch.no_grad()
    def _order(self, x: Tensor) -> Tensor:
        """Return the order of images in which each is next to its term, within its step.

        The order of a step's images leaves no trace in the update.
        """
        order = torch.arange(len(x), device=x.device)
        for step, images in self.steps:
            if len(images) > 1:
                costs = torch.cdist(self.exact[images], self.features(step, images, x[images]))
                _, nearest = linear_sum_assignment(costs.cpu().numpy())
                order[images] = images[torch.from_numpy(nearest).to(images.device)]
        return order

    def reassignments(self) -> list[tuple[int, int]]:
        """See `MatchingObjective`: none of the images that were found."""
        found = self.found.tolist()
        return [(a, b) for a, b in super().reassignments() if not found[a] and not found[b]]

    def pace(self) -> Tensor | None:
        """See `MatchingObjective`: images that were found stay where they are."""
        return None if bool(self.found.all()) else torch.where(self.found, 0.0, 1.0)

    def renew(self, x: Tensor) -> None:
        """See `Decodable`; of the weights in front of the layer.

        Adam's steps are as long for small gradients as for large ones, so that a wrong image
        misleads it. As far as an image misses its features its step goes straight to w1 instead.
        """
        names = self._body()
        if not names:
            return
        optimizer = Adam(self.training, smoothing=0.0) if self.by_adam else Sgd(self.training)
        weights, before, lengths = {n: self.w0[n] for n in names}, [], [0.0]
        for step, (batch, start) in enumerate(zip(self.batches, self.taken, strict=False)):
            before.append(weights)
            gradient, misfit = self._gradient(names, weights, x, batch, start)
            stepped = optimizer.step([weights[name] for name in names], gradient)
            if self.by_adam:
                share = 1 / (len(self.batches) - step)
                trust = (1 - misfit / _TRUSTED).clamp(0, 1)
                stepped = [
                    torch.lerp(torch.lerp(weights[name], self._end(name), share), to, trust)
                    for name, to in zip(names, stepped, strict=True)
                ]
            weights = dict(zip(names, stepped, strict=True))
            moved = sum(float((weights[name] - before[-1][name]).square().sum()) for name in names)
            lengths.append(lengths[-1] + moved**0.5)
        self._correct(names, before, weights, lengths)

    def _gradient(
        self, names: Sequence[str], weights: Weights, x: Tensor, batch: Sequence[int], start: int
    ) -> tuple[list[Tensor], Tensor]:
        """Return a step's gradient by its images that were found, and their mean misfit, ()."""
        known = torch.tensor([bool(self.found[i]) for i in batch], device=x.device)
        if not bool(known.any()):
            return [torch.zeros_like(weights[name]) for name in names], x.new_ones(())
        places = torch.arange(start, start + len(batch), device=x.device)
        images = torch.tensor(batch, device=x.device)[known]
        leaves = {n: weights[n].detach().requires_grad_() for n in names}
        features = self._features({**self.w0, **leaves}, x[images])
        inwards, seen = self.inwards[places][known], features.detach()
        if self.by_adam:
            # A gradient is known as a whole: what its features are short of, the slopes have.
            length = self._known(seen, self.spread[images]).norm(dim=1, keepdim=True)
            length = length.clamp_min(self.shortest)
            inwards, seen = inwards * self.lengths[images] / length, seen / length
        gradient = torch.autograd.grad(features, list(leaves.values()), inwards)
        return list(gradient), self._misfit(images, seen).mean()

    def _misfit(self, images: Tensor, features: Tensor) -> Tensor:
        """Return by image the share of its features' square that others miss, shape (B,)."""
        wanted, weight = self.wanted(0, images, features)
        off = (weight * (features - wanted).square()).sum(1)
        return off / (weight * wanted.square()).sum(1)

    def _correct(
        self,
        names: Sequence[str],
        before: Sequence[Weights],
        last: Weights,
        lengths: Sequence[float],
    ) -> None:
        """Keep the weights before each step, with the rest of the update spread over them."""
        total = lengths[-1] or 1.0
        rest = {name: self._end(name) - last[name] for name in names}
        self.weights_at = [
            {**self.w0, **{n: at[n] + (length / total) * rest[n] for n in names}}
            for at, length in zip(before, lengths, strict=False)
        ]

    def _end(self, name: str) -> Tensor:
        """Return a weight after the client's last step, without a defence's shortening."""
        return self.w0[name] + (self.w1[name] - self.w0[name]) / self.scale

    def _body(self) -> list[str]:
        return [name for name in self.w0 if name not in self.layer.head.names]

    def _interpolated(self) -> list[Weights]:
        """Return the weights before each step on the straight way from w0 to w1.

        Each step moves them as far as the slopes that go back from the head are long.
        """
        names, sizes = self._body(), []
        for start, batch in zip(self.taken, self.batches, strict=False):
            slopes = self.inwards[start : start + len(batch)]
            sizes.append(float(slopes.norm(dim=1).sum()))
        ways = list(accumulate(sizes, initial=0.0))
        total = ways[-1] or 1.0
        return [
            {
                **self.w0,
                **{n: torch.lerp(self.w0[n], self._end(n), way / total) for n in names},
            }
            for way in ways[:-1]
        ]

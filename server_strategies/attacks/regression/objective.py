"""Images predicted from what an update gives away in forward passes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fl_app.models.extensions import random_layers
from fl_app.models.norms import batch_norms
from fl_app.protocol import Defense, Knowledge, Observation
from server_strategies.attacks.matching.base import (
    EVERY_SETTING,
    OF_A_GRADIENT,
    MatchingObjective,
    Setting,
    channel_scale,
)
from server_strategies.attacks.matching.batch_norm import (
    inferred_statistics,
    statistics_of,
    step_shares,
)
from server_strategies.attacks.matching.features import step_features
from server_strategies.attacks.matching.gradient_match import mean_step
from server_strategies.attacks.regression.kernel import Block, regress
from server_strategies.attacks.regression.probe import Answers, Probe, channels_of

_FLOPS = 1.2e12  # of the bank's passes through the model: about a minute of one CPU core
_EXACT = 0.1  # expected relative error up to which features count as known
_LOG_FLOOR = 1e-4  # added to variances, of which the logarithm is taken
_RIDGE = 1e-2  # of the regression of statistics on features, in units of their mean square


class Regression(MatchingObjective):
    """A regression of images on what an update gives away, learned on a bank of images.

    The bank goes through the client's model in the client's mode, in batches of its size. What
    the update has of the private images, and the bank's passes of the bank's, is

    - BatchNorm's batch statistics, where the client returns its running ones: of one step
      exactly, of several in a mixture of known weights c_k, see `inferred_statistics`;
    - the classifier's input of every image, see `step_features`;
    - the gradient of one image in one step of SGD, or its sign under Adam.

    A mixture is undone as far as features tell the steps apart: with the statistics
    s(f_k) that a linear regression expects of step k,
    ``s_k = s(f_k) + c_k / sum_j c_j^2 (S - sum_j c_j s(f_j))``; without features s is the
    bank's mean. The bank's groups are mixed and unmixed alike, so that the regression learns
    how much the result is worth. For several steps the bank goes through weights half-way
    between w0 and w1.

    As a loss it is the mean squared distance of blocks, relative to the bank's variance.

    Sources: Xue et al., Fast Generation-Based Gradient Leakage Attacks (FGLA), 2022, whose
    network decodes features; Valadi et al., 2025 (arXiv 2508.19819), on BatchNorm in
    training mode.

    Parameters
    ----------
    setting : Setting
    bank : Tensor, shape (N, C, H, W)
        Images in [0, 1], see `load_bank`.
    most : int
        Images of the bank that are used at most; of a large model fewer are.

    Raises
    ------
    ValueError
        If the update gives away none of these.

    Attributes
    ----------
    psnr : float
        Expected PSNR in dB, without the truth, see `Regressed`; after `predict`.
    """

    name = "regression"
    models = EVERY_SETTING
    near_start = True

    def __init__(self, setting: Setting, bank: Tensor, most: int) -> None:
        super().__init__(setting)
        self.psnr = float("nan")
        self._learned: Answers
        seen, known = setting.observation, setting.knowledge
        self.mean, self.std = (
            each.to(next(iter(self.w0.values())))
            for each in channel_scale(known, next(iter(self.w0.values())).device)
        )
        self.distinct = list(dict.fromkeys(self.batches))
        self.size = len(self.distinct[0])
        self.mixture = self._mixture(seen, known)
        self.features, self.without = self._features(seen, known)
        # With statistics at hand a gradient that BatchNorm has centred tells nothing more.
        gradient = self._gradient(known) if self.mixture is None else None
        if self.mixture is None and self.features is None and gradient is None:
            raise ValueError(
                "nothing follows from the update in forward passes: it has no BatchNorm statistics "
                f"of the client's batches, no gradient of a single image, and {self.without}"
            )
        self.shares = self._step_shares()
        half = (len(self.batches) - 1) / (2 * len(self.batches))
        weights = {name: torch.lerp(w, self.w1[name], half) for name, w in self.w0.items()}
        label = int(self.labels[0]) if gradient is not None else None
        wanted = (self.mixture is not None, self.features is not None)
        self.probe = Probe(self.model, weights, self.training, *wanted, label)
        self.gradient = self.probe.some(gradient) if gradient is not None else ()
        self.bank = self._groups(bank, most)

    def _mixture(self, seen: Observation, known: Knowledge) -> Tensor | None:
        """Return the mixture of the batches' statistics, shape (S,)."""
        device = str(next(iter(self.w0.values())).device)
        if not statistics_of(1.0, seen, known, device) or known.defense != Defense():
            return None
        found = inferred_statistics(self.model, seen, len(self.batches))
        return torch.cat([each.to(self.mean) for each in found])

    def _features(self, seen: Observation, known: Knowledge) -> tuple[Tensor | None, str]:
        """Return the features by batch, shape (batches, B, D), NaN where not known, or why not."""
        if len({len(batch) for batch in self.distinct}) > 1:
            return None, "its batches differ in size"
        try:
            found = step_features(self.model, seen, known)
        except ValueError as error:
            return None, str(error)
        exact = found.error <= _EXACT
        if not exact.any():
            return None, "the classifier's update has its inputs in sums alone"
        values = found.values.where(exact[:, None], torch.nan).to(self.mean)
        return torch.stack([values[list(batch)] for batch in self.distinct]), ""

    def _gradient(self, known: Knowledge) -> dict[str, Tensor] | None:
        """Return the gradient of a single image by weight, or its sign; None: there is none."""
        training = self.training
        decayed = training.optimizer == "adam" and training.weight_decay
        hidden = decayed or training.max_grad_norm or training.beyond("optimizer", *OF_A_GRADIENT)
        if self.batches != ((0,),) or hidden or known.labels is None or random_layers(self.model):
            return None
        if known.defense != Defense():
            return None
        names = [name for name in self.w0 if training.trains(name)]
        w0, w1 = ([w[name] for name in names] for w in (self.w0, self.w1))
        steps = mean_step(w0, w1, training, 1)
        if training.adaptive:
            steps = [step.sign() for step in steps]
        return dict(zip(names, steps, strict=True))

    def _step_shares(self) -> list[float]:
        """Return the weight of each distinct batch in the mixture; they sum to 1."""
        layers = [layer for _, layer in batch_norms(self.model)]
        steps = len(self.batches)
        of_steps = (
            step_shares(layers[0], steps) if self.mixture is not None else [1 / steps] * steps
        )
        pairs = list(zip(self.batches, of_steps, strict=True))
        return [sum(share for other, share in pairs if other == batch) for batch in self.distinct]

    def _groups(self, bank: Tensor, most: int) -> Tensor:
        """Return the bank's images, mirrored ones after the others, by batches."""
        bank = torch.cat([bank, bank.flip(3)])[:most].to(self.mean)
        affordable = int(_FLOPS / self.probe.flops(self._normalised(bank[: self.size])))
        count = min(len(bank), max(affordable * self.size, 100)) // self.size
        return bank[: count * self.size].unflatten(0, (count, self.size))

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def predict(self) -> Tensor:
        """Learn on the bank, and return the predicted images, normalised, (N, C, H, W)."""
        self._learned = self.probe(self._normalised(self.bank))
        # Without features or a gradient the images of a batch are predicted alike: by their mean.
        images = self.bank.flatten(0, 1).unsqueeze(1) if self.apart else self.bank
        found = regress(self._blocks(self._observed), images, self.size if self.apart else 1)
        self.psnr = found.psnr
        told = "" if self.features is None else f", features of {self._told} of {self.used} images"
        self.reason = (
            f"{self.name}: {found.kernel} kernel on {found.blocks}{told}, learned on "
            f"{len(self.bank) * self.size} images; expected PSNR {self.psnr:.1f} dB"
        )
        each = found.images if self.apart else found.images.repeat_interleave(self.size, 0)
        # Images that no step trains on are the bank's mean.
        predicted = self.bank.mean((0, 1)).expand(len(self.labels), -1, -1, -1).clone()
        for place, batch in enumerate(self.distinct):
            predicted[list(batch)] = each[place * self.size : place * self.size + len(batch)]
        return self._normalised(predicted)

    @property
    def _told(self) -> int:
        """How many images' features are known."""
        assert self.features is not None
        return int(self.features[..., 0].isfinite().sum())

    @property
    def apart(self) -> bool:
        """Whether the update tells the images of a batch apart."""
        return self.size == 1 or self.features is not None

    @property
    def _observed(self) -> Answers:
        """What the update says: the mixture as its only statistics, the features by batch."""
        mixture = self.mean.new_zeros(0) if self.mixture is None else self.mixture
        none = self.mean.new_zeros(len(self.distinct), self.size, 0)
        features = none if self.features is None else self.features
        return Answers(mixture[None], features, tuple(each[None] for each in self.gradient))

    def __call__(self, x: Tensor, progress: float) -> Tensor:
        """Return the distance, shape (), of normalised images (N, C, H, W); after `predict`."""
        batches = [[*batch, *batch[-1:] * (self.size - len(batch))] for batch in self.distinct]
        found = self.probe(torch.stack([x[batch] for batch in batches]))
        shares = x.new_tensor(self.shares)[:, None]
        mixed = replace(found, statistics=(shares * found.statistics).sum(0, keepdim=True))
        sides = zip(
            self._blocks(mixed).values(), self._blocks(self._observed).values(), strict=True
        )
        apart = [
            (a.standardised()[1] - b.standardised()[1]).square().sum(1).mean() / len(a.parts)
            for a, b in sides
        ]
        return torch.stack(apart).mean()

    def at_truth(self, noise: float) -> float:
        """See `MatchingObjective`: blurred predictions never match, which is no sign of a fault."""
        return float("inf")

    def _blocks(self, asked: Answers) -> dict[str, Block]:
        """Return the regression's inputs: of the bank, and of an update's `_observed`."""
        learned, blocks = self._learned, {}
        # Features that are not known stand for none: those of the bank's mean.
        known = asked.features.isfinite()
        features = asked.features.where(known, learned.features.mean((0, 1)))
        asked = replace(asked, features=features)
        rows = self.size if self.apart else 1
        if learned.statistics.numel():
            train, test = self._unmixed(learned, asked)
            sides = [
                each.repeat_interleave(rows, 0).split(channels_of(self.model), 1)
                for each in (train, test)
            ]
            parts = [
                tuple(
                    (each.clamp(min=0) + _LOG_FLOOR).log() if place % 2 else each for each in pair
                )
                for place, pair in enumerate(zip(*sides, strict=True))
            ]
            blocks["statistics"] = Block(parts)
        if learned.features.numel():
            blocks["features"] = Block(
                [(learned.features.flatten(0, 1), asked.features.flatten(0, 1))]
            )
        if learned.gradients:
            blocks["gradient"] = Block(list(zip(learned.gradients, asked.gradients, strict=True)))
        return blocks

    def _unmixed(self, learned: Answers, asked: Answers) -> tuple[Tensor, Tensor]:
        """Return the statistics of the bank's groups (G, S) and of the update's batches (K, S)."""
        s, shares = learned.statistics, learned.statistics.new_tensor(self.shares)
        steps = len(shares)
        if steps == 1:
            return s, asked.statistics
        expected, expected_asked = _linear(learned.features.mean(1), s, asked.features.mean(1))
        gain = shares / shares.square().sum()
        mixed = asked.statistics - (shares[:, None] * expected_asked).sum(0)
        test = expected_asked + gain[:, None] * mixed
        # Every group of the bank takes its turn as one of the steps, mixed with others at random.
        generator = torch.Generator().manual_seed(0)
        own = torch.arange(len(s), device=s.device) % steps
        left = torch.zeros_like(s)
        for step in range(steps):
            order = torch.randperm(len(s), generator=generator).to(s.device)
            order = torch.where(own == step, torch.arange(len(s), device=s.device), order)
            left += shares[step] * (s - expected)[order]
        return expected + gain[own][:, None] * left, test


def _linear(a: Tensor, s: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a linear regression on rows a (n, d) makes of s (n, S), for a and for others."""
    mean, at = s.mean(0), a.mean(0)
    if not a.shape[1]:
        return mean.expand_as(s), mean.expand(len(asked), -1)
    size = (a - at).square().mean().sqrt().clamp(min=1e-12)
    a, asked = (a - at) / size, (asked - at) / size
    normal = a.T @ a + _RIDGE * len(a) * torch.eye(a.shape[1], device=a.device)
    slope = torch.linalg.solve(normal, a.T @ (s - mean))
    return mean + a @ slope, mean + asked @ slope

"""What a client's model makes of images in its own mode: the blocks of a regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from fl_app.models import classifier
from fl_app.models.extensions import local_loss
from fl_app.models.norms import batch_norms
from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.batch_norm import batch_statistics

_ENTRIES = 2048  # of each weight's gradient that are looked at, drawn at random
_NUMBERS = 10**8  # of all gradients that are in memory at once
_AT_ONCE = 50  # images in one call of the model


@dataclass(frozen=True)
class Answers:
    """What a model makes of G groups of B images each.

    Attributes
    ----------
    statistics : Tensor, shape (G, S)
        The means and variances that BatchNorm's layers see, side by side; S is 0 where they
        were not asked for.
    features : Tensor, shape (G, B, D)
        The classifier's input; D is 0 where it was not asked for.
    gradients : tuple of Tensor, shape (G, entries)
        Some entries of each weight's gradient; empty where it was not asked for.
    """

    statistics: Tensor
    features: Tensor
    gradients: tuple[Tensor, ...]


class Probe:
    """A client's model at some weights, and what of it is looked at.

    Parameters
    ----------
    model : nn.Module
        In the client's mode, see `clients_model`.
    weights : mapping of str to Tensor
        Where the model is probed.
    training : LocalTraining
    statistics, features : bool
        Whether to look at BatchNorm's statistics, and at the classifier's input.
    label : int or None
        The class of each group's one image, for its gradient; None: without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        training: LocalTraining,
        statistics: bool,
        features: bool,
        label: int | None,
    ) -> None:
        self.model, self.training, self.statistics = model, training, statistics
        self.weights = {name: w.detach() for name, w in weights.items()}
        self.classifier = model.get_submodule(classifier(model)) if features else None
        self.label = label
        matrices = [n for n, w in weights.items() if w.dim() > 1 and training.trains(n)]
        self.matrices = matrices if label is not None else []
        generator = torch.Generator().manual_seed(0)
        self.entries = {
            name: torch.randperm(weights[name].numel(), generator=generator)[:_ENTRIES]
            for name in self.matrices
        }

    def __call__(self, groups: Tensor) -> Answers:
        """Return the answers to normalised images, shape (G, B, C, H, W)."""
        at_once = max(1, _AT_ONCE // groups.shape[1])
        if self.matrices:
            at_once = min(at_once, _NUMBERS // sum(w.numel() for w in self.weights.values()) or 1)
        found = [self._answer(part) for part in groups.split(at_once)]
        gradients = zip(*(each.gradients for each in found), strict=True)
        return Answers(
            torch.cat([each.statistics for each in found]),
            torch.cat([each.features for each in found]),
            tuple(torch.cat(parts) for parts in gradients),
        )

    def flops(self, group: Tensor) -> int:
        """Return about how many floating-point operations a group (B, C, H, W) takes."""
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            functional_call(self.model, self.weights, (group,))
        return counter.get_total_flops() * (4 if self.matrices else 1)

    def some(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the entries of whole gradients that are looked at, shape (entries,) each."""
        return tuple(gradients[name].flatten()[self.entries[name]] for name in self.matrices)

    def _answer(self, groups: Tensor) -> Answers:
        with torch.no_grad():
            statistics, features = vmap(self._forward, randomness="different")(groups)
        gradients: tuple[Tensor, ...] = ()
        if self.matrices:
            gradients = vmap(self._gradient, randomness="different")(groups)
            if self.training.adaptive:  # the first step of such an optimiser is the sign
                gradients = tuple(each.sign() for each in gradients)
        return Answers(statistics, features, gradients)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = None
        if self.classifier:
            hook = self.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        if self.statistics:
            statistics = torch.cat(batch_statistics(self.model, self.weights, x))
        else:
            functional_call(self.model, self.weights, (x,))
            statistics = x.new_zeros(0)
        if hook:
            hook.remove()
        return statistics, seen[0] if seen else x.new_zeros(len(x), 0)

    def _gradient(self, x: Tensor) -> tuple[Tensor, ...]:
        assert self.label is not None
        y = torch.full((len(x),), self.label, device=x.device)
        others = {n: w for n, w in self.weights.items() if n not in self.entries}

        def loss(weights: dict[str, Tensor]) -> Tensor:
            logits = functional_call(self.model, {**others, **weights}, (x,))
            return local_loss(self.model, logits, y, self.training)

        return self.some(grad(loss)({name: self.weights[name] for name in self.matrices}))


def channels_of(model: nn.Module) -> list[int]:
    """Return the sizes of the parts that `Answers.statistics` consist of: means, variances, ..."""
    return [layer.num_features for _, layer in batch_norms(model) for _ in range(2)]

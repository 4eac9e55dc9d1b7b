"""Defences that act within local training: Soteria, and DP-SGD through opacus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fl_app.protocol import Defense, LocalTraining
from fl_app.registry import DEFENSES
from fl_app.util.extras import extras


@contextmanager
def defended_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, defense: Defense
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Yield a model and an optimiser for local training, whose steps are defended.

    Use them as the ones that were passed: forward, backward, step. The model's weights
    are trained in place. In all else it is left as it was.

    Parameters
    ----------
    model : nn.Module
        With a last layer `classifier`, see `create_model`.
    optimizer : Optimizer
        Of the model's weights.
    defense : Defense
        Its `soteria`, `dp_clip` and `dp_noise`.
    """
    if defense.dp_clip:
        with _private(model, optimizer, defense) as private:
            yield private
    elif defense.soteria:
        with _pruned_representation(model, defense.soteria):
            yield model, optimizer
    else:
        yield model, optimizer


@contextmanager
def _private(
    model: nn.Module, optimizer: torch.optim.Optimizer, defense: Defense
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """DP-SGD (Abadi et al., 2016, arXiv:1607.00133, algorithm 1), by opacus.

    Each step's gradient is ``(sum_b g_b min(1, C / ||g_b||_2) + N(0, (z C)^2)) / B``
    with the gradient g_b of image b, ``C = dp_clip`` in the gradient's units and
    ``z = dp_noise``; the client's optimiser steps with it, be it SGD or Adam. The
    noise is torch's global one.
    """
    # Opacus is slow to import, and few runs need it.
    with extras():
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model)
    private = DPOptimizer(
        optimizer,
        noise_multiplier=defense.dp_noise,
        max_grad_norm=defense.dp_clip,
        expected_batch_size=1,
    )

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        private.expected_batch_size = len(inputs[0])  # the last batch may be smaller

    handle = wrapped.register_forward_pre_hook(count)
    try:
        with warnings.catch_warnings():  # opacus' hooks need no gradient in the images
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield wrapped, private
    finally:
        handle.remove()
        wrapped.to_standard_module()


def epsilon(defense: Defense, training: LocalTraining, num_local: int, rounds: int) -> float:
    """Return the epsilon that a client's DP-SGD has spent at `Defense.delta`.

    Renyi accounting of the subsampled Gaussian mechanism (Mironov et al., 2019,
    arXiv:1908.10530), by opacus: all steps of all rounds so far, each on a share
    ``q = min(1, B / n)`` of the client's images. It takes batches to be drawn
    independently (Poisson), while here they are slices of a shuffle, as is usual, and the
    client to have trained in every round.

    Parameters
    ----------
    defense : Defense
        With DP-SGD.
    training : LocalTraining
    num_local : int
        Images that the client holds, n.
    rounds : int
        Rounds so far, >= 1.
    """
    with extras():
        from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    share = min(1.0, training.batch_size / num_local)
    steps = training.local_steps or training.local_epochs * training.steps_a_pass(num_local)
    accountant.history = [(defense.dp_noise, share, steps * rounds)]
    return accountant.get_epsilon(delta=defense.delta)


@contextmanager
def _pruned_representation(model: nn.Module, share: float) -> Iterator[None]:
    """Soteria (Sun et al., 2021, arXiv:2012.06043): prune the representation in the gradient.

    With the representation r = `features(x)` that feeds the last layer, that
    layer's gradient is taken at r' instead: r with the ``floor(share d)`` of its d
    entries set to zero that have the largest ``sum_b |r_i| / ||d r_i / d x||_2``
    (section 4.2, for the L0 norm), summed over the batch's images b. Only the
    columns of the last layer's weight change. One backward pass an entry: a
    step takes about d times as long.
    """
    last = _last_linear(model)
    images: list[Tensor] = []
    masks: list[Tensor] = []

    def take_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        images[:] = [inputs[0].detach().requires_grad_()]
        return (images[0],)

    def take_masks(module: nn.Module, inputs: tuple[Tensor]) -> None:
        masks[:] = [kept_entries(inputs[0], images[0], share)]

    handles = [
        model.register_forward_pre_hook(take_input),
        last.register_forward_pre_hook(take_masks),
        last.weight.register_hook(lambda gradient: gradient * masks[0]),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_linear(model: nn.Module) -> nn.Linear:
    classifier = model.get_submodule("classifier").modules()
    return [layer for layer in classifier if isinstance(layer, nn.Linear)][-1]


def kept_entries(representation: Tensor, images: Tensor, share: float) -> Tensor:
    """Return 1 for the entries of a representation that Soteria keeps, 0 for the others.

    Parameters
    ----------
    representation : Tensor, shape (B, d)
        With its graph from `images`.
    images : Tensor, shape (B, C, H, W)
        Normalised.
    share : float
        In [0, 1).

    Returns
    -------
    Tensor, shape (d,)
    """
    score = torch.zeros_like(representation[0])
    for i in range(representation.shape[1]):
        (slope,) = torch.autograd.grad(representation[:, i].sum(), images, retain_graph=True)
        length = slope.flatten(1).norm(dim=1)
        size = representation[:, i].detach().abs()
        # An entry that depends on no pixel, of a dead ReLU, reveals nothing of the image.
        score[i] = torch.where(length > 0, size / length, 0.0).sum()
    pruned = score.argsort(descending=True)[: math.floor(share * len(score))]
    return torch.ones_like(score).index_fill_(0, pruned, 0.0)


def check_defense(defense: Defense, training: LocalTraining, model: nn.Module) -> None:
    """Refuse a defence that does not work with the client's training or its model.

    Raises
    ------
    ValueError
        With the setting, its value, and what is allowed instead.
    """
    if defense.custom and defense.custom not in DEFENSES:
        raise ValueError(f"custom: {DEFENSES.unknown(defense.custom)}")
    normalised = [name for name, part in model.named_modules() if _is_batch_norm(part)]
    if defense.dp_clip:
        if training.max_grad_norm:
            raise ValueError(
                f"dp_clip is {defense.dp_clip}; allowed with client.max_grad_norm "
                f"{training.max_grad_norm}: 0, for DP-SGD clips the gradients itself"
            )
        # They enter a gradient beside the images' own, or mix these before each is clipped.
        words = training.beyond(
            "optimizer", "optimizer_options", "loss", "label_smoothing", "schedule", "drop_last",
            "trainable", "groups",
        )  # fmt: skip
        if words or callable(training.loss):
            raise ValueError(
                f"dp_clip is {defense.dp_clip}; allowed with client.{words or 'loss a callable'}: 0"
            )
        with extras():
            from opacus.validators import ModuleValidator

        errors = ModuleValidator.validate(model.train(), strict=False)
        if errors:
            advice = " (use model norm group)" if normalised else ""
            raise ValueError(
                f"dp_clip is {defense.dp_clip}; allowed with this model: 0{advice}, for "
                f"{str(errors[0]).splitlines()[0]}"
            )
    if defense.soteria and not _prunes(model, training):
        raise ValueError(
            f"soteria is {defense.soteria}; allowed where client.trainable leaves out the "
            "classifier's weights, which it prunes: 0"
        )
    if defense.local_dp and normalised:
        raise ValueError(
            f"local_dp is {defense.local_dp}; allowed with BatchNorm ({normalised[0]}): 0 (use "
            "model norm group, or clip and noise), for Flower's LocalDpMod adds noise to its "
            "statistics"
        )


def _prunes(model: nn.Module, training: LocalTraining) -> bool:
    """Return whether the weights whose gradient Soteria prunes are trained."""
    last = _last_linear(model).weight
    return any(training.trains(name) for name, each in model.named_parameters() if each is last)


def _is_batch_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm)

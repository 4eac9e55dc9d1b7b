"""The client's own K local steps, simulated differentiably.

The gradient comes from the adjoint method, not from one graph over all K steps: autograd
differentiates one local gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fl_app.protocol import LocalTraining
from fl_app.protocol.optimizer import create_optimizer
from server_strategies.attacks.matching.distance import norm
from server_strategies.attacks.matching.gradient import loss_gradient
from server_strategies.attacks.matching.optimizers import Optimizer, optimizer_of

# Memory for the local steps' graphs, in bytes: a quarter of a 24 GB card. Steps beyond it
# compute their graphs again in the backward pass.
KEPT_GRAPHS = 6_000_000_000


def simulate(
    model: nn.Module,
    w0: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, ...]],
    training: LocalTraining,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Train locally as the client does, differentiably in the batches.

    Parameters
    ----------
    model : nn.Module
        Gives the architecture; its own weights are not read.
    w0 : mapping of str to Tensor
        Start, by parameter name.
    batches : sequence of (Tensor (B, C, H, W), Tensor (B,) or (B, num_classes), ...)
        Normalised images and labels, or probabilities, of each local step, in
        order, followed by the noise of the model's random layers, see `given_noise`.
    training : LocalTraining
    smoothing : float
        See `Adam`. 0: exactly the client's arithmetic.

    Returns
    -------
    dict of str to Tensor
        The weights after the last step. They can be back-propagated once.
    """
    start = {name: w.detach() for name, w in w0.items() if training.trains(name)}
    frozen = {name: w.detach() for name, w in w0.items() if name not in start}
    optimizer = optimizer_of(training, list(start), smoothing)
    steps = _Steps(model, training, start, frozen, len(batches[0]))
    flat = [part for batch in batches for part in batch]
    weights = _Simulation.apply(steps, optimizer, list(start.values()), *flat)
    trained = dict(zip(start, weights, strict=True))
    return {name: trained[name] if name in trained else frozen[name] for name in w0}


def simulated_weights(
    model: nn.Module,
    w0: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, ...]],
    training: LocalTraining,
) -> dict[str, Tensor]:
    """Return the weights of `simulate`, without a way back: no memory grows with the steps.

    Parameters
    ----------
    model, w0, batches, training
        See `simulate`.
    """
    start = {name: w.detach() for name, w in w0.items() if training.trains(name)}
    frozen = {name: w.detach() for name, w in w0.items() if name not in start}
    steps = _Steps(model, training, start, frozen, len(batches[0]))
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    optimizer = create_optimizer(weights, training)
    leaves = list(weights.values())
    flat = [part for batch in batches for part in batch]
    for taken in steps.taken(flat):
        for weight, g in zip(leaves, steps._differentiable(leaves, taken), strict=True):
            weight.grad = g.detach()
        optimizer.step()
    return {name: weights[name].detach() if name in weights else w for name, w in w0.items()}


@dataclass
class _Steps:
    """The gradients of a simulation's steps, and their derivatives in reverse order."""

    model: nn.Module
    training: LocalTraining
    start: Mapping[str, Tensor]  # trained weights before the first step
    frozen: Mapping[str, Tensor]
    parts: int  # tensors of a batch
    graph_bytes: int = 0  # of one step, measured on the first
    tape: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = field(default_factory=list)

    def gradient(self, w: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
        """Return a step's gradient at `w`, of one batch or several, and keep what derives it."""
        w = [w_.detach().requires_grad_() for w_ in w]
        leaves = [part.detach().requires_grad_(part.requires_grad) for part in batch]
        if self.tape and self.graph_bytes * (len(self.tape) + 1) > KEPT_GRAPHS:
            self.tape.append((w, leaves, []))
            return [g.detach() for g in self._differentiable(w, leaves)]
        if self.tape:
            gradient = self._differentiable(w, leaves)
        else:
            gradient, self.graph_bytes = _weighed(lambda: self._differentiable(w, leaves))
        self.tape.append((w, leaves, gradient))
        return [g.detach() for g in gradient]

    def taken(self, flat: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yield what each of the optimiser's steps takes of all batches' parts."""
        size = self.parts * self.training.accumulate
        return (flat[first : first + size] for first in range(0, len(flat), size))

    def _differentiable(self, w: list[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
        weights = {**dict(zip(self.start, w, strict=True)), **self.frozen}
        firsts = range(0, len(batch), self.parts)
        each = []
        for first in firsts:
            x, y, *noise = batch[first : first + self.parts]
            of_batch = loss_gradient(self.model, weights, x, y, self.training, noise)
            each.append(of_batch[: len(w)])
        gradient = each[0]
        if self.training.accumulate > 1:
            gradient = [sum(of) / self.training.accumulate for of in zip(*each, strict=True)]
        if self.training.proximal:
            share = self.training.proximal * len(firsts) / self.training.accumulate
            moved = zip(gradient, w, self.start.values(), strict=True)
            gradient = [g + share * (w_ - before) for g, w_, before in moved]
        if self.training.max_grad_norm:
            # As in torch.nn.utils.clip_grad_norm_, which can't be differentiated.
            factor = (self.training.max_grad_norm / (norm(gradient) + 1e-6)).clamp(max=1)
            gradient = [factor * g for g in gradient]
        return list(gradient)

    def vjp(self, dg: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return dg times the derivative of the last kept gradient in its weights and batch."""
        w, batch, gradient = self.tape.pop()
        first = not self.tape  # the gradient in w0 is not needed
        wanted = [part for part in batch if part.requires_grad] + ([] if first else w)
        products = iter(
            torch.autograd.grad(
                gradient or self._differentiable(w, batch), wanted, dg, allow_unused=True
            )
        )
        on_batch = [next(products) if part.requires_grad else None for part in batch]
        return list(products), on_batch


def _weighed(compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    """Return a computation's result, and the bytes that its graph keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return compute(), sum(kept.values())


class _Simulation(torch.autograd.Function):
    """The weights after K batches, given as one flat list of tensors, by the adjoint method."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, steps: _Steps, optimizer: Optimizer, w0: list[Tensor], *batches: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.steps, ctx.optimizer, w = steps, optimizer, w0
        with torch.enable_grad():
            for batch in steps.taken(batches):
                g = steps.gradient(w, batch)
                with torch.no_grad():
                    w = optimizer.step(w, g)
        return tuple(w)

    @staticmethod
    def backward(ctx: Any, *last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dw = [d.clone() for d in last]
        on_batches: list[Tensor | None] = []
        while ctx.steps.tape:
            dg = ctx.optimizer.step_back(dw)
            with torch.enable_grad():
                on_weights, on_batch = ctx.steps.vjp(dg)
            for d, product in zip(dw, on_weights, strict=False):  # none for w0
                if product is not None:
                    d.add_(product)
            on_batches[:0] = on_batch
        return None, None, None, *on_batches

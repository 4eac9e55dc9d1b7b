"""The client's own K local steps, simulated differentiably.

The gradient comes from the adjoint method, not from one graph over all K steps: autograd
differentiates one local gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fl_app.protocol import LocalTraining
from fl_app.protocol.optimizer import create_optimizer
from server_strategies.attacks.matching.distance import norm
from server_strategies.attacks.matching.fast_layers import Layers
from server_strategies.attacks.matching.gradient import client_loss
from server_strategies.attacks.matching.optimizers import Optimizer, optimizer_of
from server_strategies.attacks.matching.outer_products import (
    LinearLayer,
    OuterSum,
    coefficients,
)

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
    steps = _Steps(model, training, w0, len(batches[0]))
    return dict(w0) | steps.simulated(batches, smoothing)[0]


def displacement(
    model: nn.Module,
    w0: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, ...]],
    training: LocalTraining,
    smoothing: float = 0.0,
    sums: Collection[str] = (),
) -> list[Tensor | OuterSum]:
    """Return ``w_K - w0``, in one piece a weight of `w0`; back-propagated once.

    Made for speed: sums are taken in another order than a client on a CPU takes them. Adam turns
    the rounding of gradients that are nearly zero into whole steps, in a few coordinates.

    Parameters
    ----------
    model, w0, batches, training, smoothing
        See `simulate`.
    sums : collection of str
        Weights that are not formed, see `cheaper_as_sums`.
    """
    steps = _Steps(model, training, w0, len(batches[0]), sums, fast=True)
    weights, changes = steps.simulated(batches, smoothing)
    return [
        changes[name] if name in changes else weights.get(name, w) - w for name, w in w0.items()
    ]


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
    steps = _Steps(model, training, w0, len(batches[0]))
    weights = {name: w.clone().requires_grad_() for name, w in steps.start.items()}
    optimizer = create_optimizer(weights, training)
    leaves = list(weights.values())
    flat = [part for batch in batches for part in batch]
    for taken in steps.taken(flat):
        for weight, g in zip(leaves, steps.differentiable(leaves, taken, 0), strict=True):
            weight.grad = g.detach()
        optimizer.step()
    return {name: weights[name].detach() if name in weights else w for name, w in w0.items()}


@dataclass
class _Sum:
    """A weight as a sum of outer products, see `outer_products`."""

    before: Tensor  # the first step
    coefficients: list[list[float]]  # see `coefficients`
    rows: list[int] = field(default_factory=list)  # of each step so far

    def scaled(self, step: int, outputs: Tensor) -> Tensor:
        """Return the outputs of the rows before a step, each by its factor then."""
        factors = self.coefficients[step][1:]
        if len(set(factors)) == 1:
            return factors[0] * outputs
        parts = zip(factors, outputs.split(self.rows[:step]), strict=True)
        return torch.cat([factor * part for factor, part in parts]) if factors else outputs

    def layer(self, step: int, inputs: Tensor, outputs: Tensor) -> LinearLayer:
        """Return the layer in a step, given the rows of the steps before."""
        return LinearLayer(self.coefficients[step][0], inputs, self.scaled(step, outputs))

    def change(self, inputs: Tensor, outputs: Tensor) -> Tensor | OuterSum:
        """Return how far the weight is from where it started, given the rows of all steps."""
        last = len(self.rows)
        found, scale = OuterSum(self.scaled(last, outputs), inputs), self.coefficients[last][0]
        return found if scale == 1 else (scale - 1) * self.before + found.dense()


class _Steps:
    """The gradients of a simulation's steps, and their derivatives in reverse order.

    Where weights are sums, a step's weights are followed by the inputs and the outputs of the rows
    before it, sum by sum, and its gradients by those of its own rows.

    Attributes
    ----------
    start : dict of str to Tensor
        Trained weights before the first step, but for sums.
    graph_bytes : int
        Of one step, measured on the first.
    tape : list
        By step the weights, the batch, and the gradient; [] where it is to be computed again.
    """

    def __init__(
        self,
        model: nn.Module,
        training: LocalTraining,
        w0: Mapping[str, Tensor],
        parts: int,  # tensors of a batch
        sums: Collection[str] = (),
        fast: bool = False,  # rather than in the client's own order of sums
    ) -> None:
        self.model, self.training, self.parts, self.fast = model, training, parts, fast
        before = {name: w.detach() for name, w in w0.items()}
        self.start = {n: w for n, w in before.items() if training.trains(n) and n not in sums}
        self.frozen = {n: w for n, w in before.items() if n not in self.start}
        self.names = tuple(sums)
        self.sums: list[_Sum] = []
        self.graph_bytes = 0
        self.tape: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def simulated(
        self, batches: Sequence[Sequence[Tensor]], smoothing: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | OuterSum]]:
        """Return the weights after the last step, and the changes of those that are sums."""
        optimizer = optimizer_of(self.training, list(self.start), smoothing)
        flat = [part for batch in batches for part in batch]
        count = len(list(self.taken(flat)))
        self.sums = [
            _Sum(self.frozen[name], coefficients(self.training, name, count)) for name in self.names
        ]
        found = _Simulation.apply(self, optimizer, list(self.start.values()), *flat)
        weights, rows = found[: len(self.start)], found[len(self.start) :]
        changes = {
            name: each.change(*rows[2 * place : 2 * place + 2])
            for place, (name, each) in enumerate(zip(self.names, self.sums, strict=True))
        }
        return dict(zip(self.start, weights, strict=True)), changes

    def gradient(self, w: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
        """Return a step's gradient at `w`, of one batch or several, and keep what derives it."""
        w = [w_.detach().requires_grad_() for w_ in w]
        leaves = [part.detach().requires_grad_(part.requires_grad) for part in batch]
        step = len(self.tape)
        if step and self.graph_bytes * (step + 1) > KEPT_GRAPHS:
            self.tape.append((w, leaves, []))
            return [g.detach().contiguous() for g in self.differentiable(w, leaves, step)]
        if step:
            gradient = self.differentiable(w, leaves, step)
        else:
            gradient, self.graph_bytes = _weighed(lambda: self.differentiable(w, leaves, step))
        self.tape.append((w, leaves, gradient))
        return [g.detach().contiguous() for g in gradient]

    def taken(self, flat: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yield what each of the optimiser's steps takes of all batches' parts."""
        size = self.parts * self.training.accumulate
        return (flat[first : first + size] for first in range(0, len(flat), size))

    def differentiable(
        self, w: Sequence[Tensor], batch: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        """Return a step's gradient, differentiable in its weights and its batch."""
        trained, rows = w[: len(self.start)], w[len(self.start) :]
        weights = {**dict(zip(self.start, trained, strict=True)), **self.frozen}
        firsts = range(0, len(batch), self.parts)
        each_batch, own = [], []
        for first in firsts:
            x, y, *noise = batch[first : first + self.parts]
            layers = [
                each.layer(step, *rows[2 * place : 2 * place + 2])
                for place, each in enumerate(self.sums)
            ]
            quick = Layers([each.before for each in self.sums], layers) if self.fast else None
            loss = client_loss(self.model, weights, x, y, self.training, noise, quick)
            met = [layer.met[0] for layer in layers]
            wanted = [*trained, *(outputs for _, outputs in met)]
            parts = torch.autograd.grad(loss, wanted, create_graph=True)
            each_batch.append(parts[: len(trained)])
            outer = zip(met, parts[len(trained) :], strict=True)
            own.append([part for (inputs, _), d in outer for part in (inputs, d)])
        gradient: Sequence[Tensor] = each_batch[0]
        if self.training.accumulate > 1:
            share = 1 / self.training.accumulate
            gradient = [share * sum(of) for of in zip(*each_batch, strict=True)]
            own = [
                [share * part if place % 2 else part for place, part in enumerate(of)] for of in own
            ]
        if self.training.proximal:
            share = self.training.proximal * len(firsts) / self.training.accumulate
            moved = zip(gradient, trained, self.start.values(), strict=True)
            gradient = [g + share * (w_ - before) for g, w_, before in moved]
        if self.training.max_grad_norm:
            # As in torch.nn.utils.clip_grad_norm_, which can't be differentiated.
            factor = (self.training.max_grad_norm / (norm(gradient) + 1e-6)).clamp(max=1)
            gradient = [factor * g for g in gradient]
        return [*gradient, *(torch.cat(of) for of in zip(*own, strict=True))]

    def vjp(self, dg: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return dg times the derivative of the last kept gradient in its weights and batch."""
        w, batch, gradient = self.tape.pop()
        step = len(self.tape)
        of_images = [part for part in batch if part.requires_grad]
        wanted = of_images + (w if step else [])  # the gradient in w0 is not needed
        gradient = gradient or self.differentiable(w, batch, step)
        # A first layer's inputs are given, where images are.
        moving = [(g, d) for g, d in zip(gradient, dg, strict=True) if g.requires_grad]
        products = iter(
            torch.autograd.grad(
                [g for g, _ in moving], wanted, [d for _, d in moving], allow_unused=True
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
    """The weights after K batches, given as one flat list of tensors, by the adjoint method.

    They are followed by the rows of sums, see `_Steps`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, steps: _Steps, optimizer: Optimizer, w0: list[Tensor], *batches: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.steps, ctx.optimizer, w = steps, optimizer, w0
        rows = [each.before.new_empty(0, n) for each in steps.sums for n in each.before.shape[::-1]]
        with torch.enable_grad():
            for batch in steps.taken(batches):
                g = steps.gradient([*w, *rows], batch)
                for place, each in enumerate(steps.sums):
                    each.rows.append(len(g[len(w) + 2 * place]))
                with torch.no_grad():
                    rows = [torch.cat(both) for both in zip(rows, g[len(w) :], strict=True)]
                    w = optimizer.step(w, g[: len(w)])
        return *w, *rows

    @staticmethod
    def backward(ctx: Any, *last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        steps: _Steps = ctx.steps
        count = len(steps.start)
        dw, drows = [d.clone() for d in last[:count]], [d.clone() for d in last[count:]]
        on_batches: list[Tensor | None] = []
        while steps.tape:
            before = [len(rows) for rows in steps.tape[-1][0][count:]]
            dg = ctx.optimizer.step_back(dw)
            own = [d[rows:] for d, rows in zip(drows, before, strict=True)]
            drows = [d[:rows] for d, rows in zip(drows, before, strict=True)]
            with torch.enable_grad():
                on_weights, on_batch = steps.vjp([*dg, *own])
            for d, product in zip([*dw, *drows], on_weights, strict=False):  # none for w0
                if product is not None:
                    d.add_(product)
            on_batches[:0] = on_batch
        return None, None, None, *on_batches

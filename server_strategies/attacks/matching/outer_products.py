"""Weights of linear layers as sums of outer products, which are never formed.

The gradient of a linear layer is ``D' H``, with its inputs H (R, in) and the loss's gradient D
(R, out) in its outputs, for the R rows of a batch. Under SGD a weight is therefore
``W_k = s_k W_0 + sum_j c_kj D_j' H_j``, and all that step k needs of it is
``H W_k' = s_k H W_0' + sum_j c_kj (H H_j') D_j``. A wide layer has a million entries, which every
step would write and read several times, but few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.fast_layers import Layers
from server_strategies.attacks.matching.gradient import client_loss
from server_strategies.attacks.matching.optimizers import optimizer_of

_SMALL = 1 << 16  # entries up to which a weight is cheap to form
_AS_EQUAL = 1e-4  # relative difference of two ways to one gradient


@dataclass
class OuterSum:
    """The matrix ``D' H``, of outputs D (R, out) and inputs H (R, in)."""

    outputs: Tensor
    inputs: Tensor

    def dense(self) -> Tensor:
        """Return the matrix, shape (out, in)."""
        return self.outputs.T @ self.inputs

    def square(self) -> Tensor:
        """Return the sum of its entries' squares, shape ().

        In double precision, as its difference to nearly the same number is wanted.
        """
        h, d = self.inputs.double(), self.outputs.double()
        return ((h @ h.T) * (d @ d.T)).sum()

    def dot(self, other: Tensor) -> Tensor:
        """Return the sum of its entries' products with those of a matrix (out, in), shape ()."""
        return (self.outputs @ other * self.inputs).sum(dtype=torch.float64)


@dataclass
class LinearLayer:
    """A linear layer in one local step.

    Attributes
    ----------
    scale : float
        s_k.
    inputs, outputs : Tensor, shape (R, in), (R, out)
        H_j and c_kj D_j of the steps before.
    met : list of (Tensor, Tensor)
        By call in this step, its inputs (rows, in), and its outputs (rows, out).
    """

    scale: float
    inputs: Tensor
    outputs: Tensor
    met: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output (..., out) for an input (..., in); parameters as `F.linear`.

        `weight` is W_0.
        """
        rows = input.reshape(-1, input.shape[-1])
        y = F.linear(rows, weight)
        if self.scale != 1:
            y = self.scale * y
        if len(self.inputs):
            y = torch.addmm(y, rows @ self.inputs.T, self.outputs)
        if bias is not None:
            y = y + bias
        self.met.append((rows, y))
        return y.view(*input.shape[:-1], -1)


def coefficients(training: LocalTraining, name: str, steps: int) -> list[list[float]]:
    """Return s_k and c_kj of a weight under SGD, by k from 0 to the number of steps.

    SGD is linear: it is run on the unit vectors of W_0 and of the gradients.
    """
    units = torch.eye(steps + 1, dtype=torch.float64)
    optimizer, rows = optimizer_of(training, [name], 0.0), [units[0]]
    for unit in units[1:]:
        rows += optimizer.step(rows[-1:], [unit])
    return [row[: k + 1].tolist() for k, row in enumerate(rows)]


def cheaper_as_sums(
    model: nn.Module,
    w0: Mapping[str, Tensor],
    batch: Sequence[Tensor],
    training: LocalTraining,
    images: int,
) -> tuple[str, ...]:
    """Return the names of the weights that a simulation had better not form.

    Those of linear layers whose rows, of all steps, have no more numbers than the weight, and which
    the model reads in these layers alone: there ``D' H`` is autograd's gradient. Only under
    SGD, without what is not linear in the gradients.

    Parameters
    ----------
    model, w0, training
        See `simulate`.
    batch : sequence of Tensor
        Images, labels and noise of one local step, see `simulate`.
    images : int
        That all local steps train on, each as often as it is used.
    """
    if training.optimizer != "sgd" or training.max_grad_norm or training.proximal:
        return ()
    names = [
        f"{name}.weight"
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer.weight.numel() > _SMALL
    ]
    weights = {name: w.detach().requires_grad_() for name, w in w0.items()}
    names = [name for name in names if name in weights and training.trains(name)]
    if not names:
        return ()
    none = next(iter(weights.values())).new_empty(0)
    layers = [LinearLayer(1.0, none, none) for _ in names]
    x, labels, *noise = (part.detach() for part in batch)
    quick = Layers([weights[name] for name in names], layers)
    with torch.enable_grad():
        loss = client_loss(model, weights, x, labels, training, noise, quick)
    cheaper = []
    for name, layer in zip(names, layers, strict=True):
        if len(layer.met) != 1:
            continue
        ((inputs, outputs),) = layer.met
        gradient, d = torch.autograd.grad(loss, (weights[name], outputs), retain_graph=True)
        few = len(inputs) / len(x) * images * sum(gradient.shape) <= gradient.numel()
        if few and (gradient - d.T @ inputs).norm() <= _AS_EQUAL * gradient.norm():
            cheaper.append(name)
    return tuple(cheaper)

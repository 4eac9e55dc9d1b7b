"""ReLU with a slope of its gate: what autograd leaves out of a gradient's gradient.

Matching takes second derivatives. ReLU hands the gradient g of its output on to its
input z as ``g H(z)``, and autograd takes the step H for a constant: to it, no change of
an image opens or closes a unit. Nearly all of what changes in a gradient of a ReLU
network are such openings and closings, so the search goes blind along most directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RELU_SMOOTHING = 16.0
"""Of the slope, where nothing speaks against one. The best of `flowleak bench gates`."""

_RELUS = (F.relu, torch.relu, Tensor.relu)


def smooth_relu(model: nn.Module, width: float) -> None:
    """Let a model's ReLU gates have a slope in second derivatives; values and gradients stay.

    The step's derivative, ``delta(z)``, becomes the density ``N(z; 0, (width rms(z))^2)``,
    with the root mean square over the layer's input: the surrogate gradient of Neftci
    et al., 2019, for the gate instead of a neuron's spike. A wide one is a small slope
    almost everywhere.

    Parameters
    ----------
    model : nn.Module
        Changed in place, whether it calls `relu` as a module or as a function.
    width : float
        Positive.

    Raises
    ------
    ValueError
        If `width` is not positive.
    """
    if width <= 0:
        raise ValueError(f"relu_smoothing is {width}; allowed: more than 0")
    forward = model.forward

    def sloped(*args: Any, **kwargs: Any) -> Any:
        with _SlopedRelu(width):
            return forward(*args, **kwargs)

    model.forward = sloped  # type: ignore[method-assign]


class _SlopedRelu(TorchFunctionMode):
    """While it is entered, calls of `relu` are of `_Relu`."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RELUS:
            return _Relu.apply(args[0] if args else kwargs["input"], self.width)
        return func(*args, **kwargs)


class _Relu(torch.autograd.Function):
    """max(z, 0), whose gradient is `_Gate`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, width: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z)
        ctx.width = width
        return z.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return _Gate.apply(g, z, ctx.width), None


class _Gate(torch.autograd.Function):
    """g H(z), with a smooth slope in z."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, z: Tensor, width: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(g, z)
        ctx.width = width
        return g * (z > 0)

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        g, z = ctx.saved_tensors
        scale = ctx.width * z.square().mean().sqrt() + 1e-30  # of an input of zeros it is zero
        density = torch.exp(-0.5 * (z / scale).square()) / (math.sqrt(2 * math.pi) * scale)
        return pull * (z > 0), pull * g * density, None

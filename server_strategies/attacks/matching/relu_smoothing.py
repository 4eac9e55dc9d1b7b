"""Surrogate gradients for ReLU: of its second derivative, and of its first one's step.

Update matching takes second derivatives. ReLU passes the gradient g of its output on to
its input z as ``g H(z)``, and autograd takes the step function H for a constant. To it,
no change of an image activates or deactivates a unit. But nearly all of what changes in
a gradient of a ReLU network are units that become active or inactive, so along most
directions the search has no gradient to follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RELU_SMOOTHING = 16.0
"""The default width of the surrogate gradient: the best of a benchmark over widths."""

_SHUT = 20.0  # widths below zero from which a gate is closed as far as it can be

RELUS = (F.relu, torch.relu, Tensor.relu)


def smooth_relu(model: nn.Module, width: float) -> None:
    """Give a model's ReLU a surrogate second derivative; values and gradients stay.

    The step's derivative ``delta(z)`` is replaced by the density
    ``N(z; 0, (width rms(z))^2)``, with the root mean square over the layer's input. It is
    the surrogate gradient of Neftci et al., 2019, there for the spike of a neuron. A
    large width gives a small derivative almost everywhere.

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

    def smoothed(*args: Any, **kwargs: Any) -> Any:
        if _ReluAs.entered:  # the caller's own replacement, such as soft gates, goes first
            return forward(*args, **kwargs)
        with _ReluAs(lambda z: relu(z, width)):
            return forward(*args, **kwargs)

    model.forward = smoothed  # type: ignore[method-assign]


def relu(z: Tensor, width: float = 0.0) -> Tensor:
    """Return max(z, 0), with the surrogate second derivative of `smooth_relu`; 0: none."""
    found: Tensor = _Relu.apply(z, width)
    return found


def soft_gates(width: float) -> TorchFunctionMode:
    """Return a context in which ReLU's first derivative is soft, and its value stays.

    The step function is replaced by ``sigmoid(z / (width rms(z)))``, with the root mean
    square by image, which autograd takes for a constant. A unit that is nearly active then
    has a derivative, so that a least-squares step may activate it.

    Parameters
    ----------
    width : float
        Positive.
    """

    def softened(z: Tensor) -> Tensor:
        value = z.detach()
        scale = value.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (z.dim() - 1))
        # Bounded, since denormal numbers are slow.
        gate = torch.sigmoid((value / (width * scale + 1e-30)).clamp_min(-_SHUT))
        return value.clamp_min(0) + (z - value) * gate

    return _ReluAs(softened)


def open_gates() -> TorchFunctionMode:
    """Return a context in which ReLU is the identity: all its units are active."""
    return _ReluAs(lambda z: z)


class _ReluAs(TorchFunctionMode):
    """While it is entered, another function is called in the place of `relu`."""

    entered: ClassVar[int] = 0

    def __init__(self, other: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.other = other

    def __enter__(self) -> Self:
        _ReluAs.entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _ReluAs.entered -= 1
        super().__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in RELUS:
            return self.other(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


class _Relu(torch.autograd.Function):
    """max(z, 0), whose backward pass is `_ReluBackward`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, width: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z)
        ctx.width = width
        return z.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return _ReluBackward.apply(g, z, ctx.width), None


class _ReluBackward(torch.autograd.Function):
    """g H(z), with the surrogate derivative in z."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, z: Tensor, width: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(g, z)
        ctx.width = width
        return _passed_on(g, z)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        g, z = ctx.saved_tensors
        if not ctx.width:
            return _passed_on(h, z), None, None
        # In place: it is bound by memory.
        change = z.square()
        scale = ctx.width * change.mean().sqrt() + 1e-30  # the constant is for inputs of zeros
        change.mul_(-0.5 / scale.square()).exp_()
        change.mul_(g).mul_(h).mul_(1 / (math.sqrt(2 * math.pi) * scale))
        return _passed_on(h, z), change, None


def _passed_on(g: Tensor, z: Tensor) -> Tensor:
    """Return ``g H(z)``."""
    return torch.ops.aten.threshold_backward(g, z, 0)

"""A network's layers in forms whose second derivatives are cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from server_strategies.attacks.matching.relu_smoothing import RELUS, relu


class Layers(TorchFunctionMode):
    """A context in which layers are computed in forms that are cheap to differentiate twice.

    Average pooling and ReLU without the zeros that autograd adds to the gradients of their inputs.

    Parameters
    ----------
    weights : sequence of Tensor
        Of linear layers that are computed otherwise.
    layers : sequence of callable
        What each of these is computed by, in the place of `F.linear`.
    """

    def __init__(
        self, weights: Sequence[Tensor] = (), layers: Sequence[Callable[..., Tensor]] = ()
    ) -> None:
        super().__init__()
        self.layers = {id(w): layer for w, layer in zip(weights, layers, strict=True)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            layer = self.layers.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
            if layer:
                return layer(*args, **kwargs)
        if func in RELUS:
            return relu(args[0] if args else kwargs["input"])
        if func is F.avg_pool2d and len(args) == 2 and not kwargs:
            return _AveragePool.apply(*args)
        return func(*args, **kwargs)


class _AveragePool(torch.autograd.Function):
    """`F.avg_pool2d` with a kernel's size alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Any) -> Tensor:  # type: ignore[override]
        ctx.x, ctx.size = x.detach(), size
        return F.avg_pool2d(x, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _AveragePoolBackward.apply(g, ctx.x, ctx.size), None


class _AveragePoolBackward(torch.autograd.Function):
    """Its derivative, which is linear, and of whose input only the shape counts."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, size: Any) -> Tensor:  # type: ignore[override]
        ctx.size = size
        kernel = [size, size] if isinstance(size, int) else list(size)
        last = x.is_contiguous(memory_format=torch.channels_last)
        g = g.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        back = torch.ops.aten.avg_pool2d_backward
        return back(g, x, kernel, kernel, [0, 0], False, True, None)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return F.avg_pool2d(h, ctx.size), None, None


def laid_out(tensor: Tensor) -> Tensor:
    """Return images, or a convolution's weights, with channels last on a CPU: much faster there."""
    if tensor.dim() == 4 and tensor.device.type == "cpu":
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor

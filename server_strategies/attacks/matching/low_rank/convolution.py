"""What the update of the last convolution says of the images, once they are nearly known.

Its weights' gradient in a step is ``sum_n sum_p s_np h_np y_np'`` over positions p, with the
patches y of the convolution's inputs, the gates h of the ReLU behind it, and the slopes s
that go back from the layer whose features are exact; these do not depend on the image. So
the update gives one linear equation of the patches for each weight, ten thousands of them,
of all images together, but for gates that are not yet known: at an image of 30 dB a hundred
are wrong, which changes the update more than the image's own error does. In each of the
convolution's output channels only a few gates are unsure, though. Each enters the
channel's equations along its own patch, so that across these patches nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import unfold
from torch.nn.grad import conv2d_input

from server_strategies.attacks.matching.relu_smoothing import open_gates

_GATES = 0.01  # least width of the gates, in root mean squares of what goes into the ReLU
_SHUT = 20.0  # widths below zero from which a gate is closed, see `soft_gates`
_UNSURE = 0.125  # gates of a channel that are left open, as a share of its equations
_NOISE = 0.01  # of an equation, in root mean squares of the update
_LINEAR = 1e-4  # relative rounding of what follows the ReLU
_CLOSED = 1e-6  # share of an image's largest feature up to which another one is zero


class Convolution:
    """The equations that a convolution's update gives of its inputs.

    Parameters
    ----------
    layer : nn.Conv2d
        Its weights are not read.
    update : Tensor, shape (O, C, h, w)
        ``sum_n worth g_n``, what the gradients of all images make of the weights.
    slopes : Tensor, shape (N, O, H, W)
        s, with `worth` as a factor.
    live : Tensor of bool, shape (N, O, H, W)
        Where a gate may be open: not where the unit's feature is zero.
    """

    def __init__(self, layer: nn.Conv2d, update: Tensor, slopes: Tensor, live: Tensor) -> None:
        self.layer, self.update, self.live = layer, update, live
        self.slopes = torch.where(live, slopes, 0.0)
        self.square = update.square().sum()

    def gates(self, outputs: Tensor, misfit: Tensor) -> Tensor:
        """Return how probably each gate is open, shape (N, O, H, W).

        Parameters
        ----------
        outputs : Tensor, shape (N, O, H, W)
            What comes out of the convolution, into the ReLU.
        misfit : Tensor, shape (N,)
            Relative squared error of the features: it makes more gates unsure.
        """
        width = misfit.sqrt().clamp_min(_GATES).view(-1, 1, 1, 1)
        scale = outputs.square().mean((1, 2, 3), keepdim=True).sqrt()
        return torch.sigmoid((outputs / (width * scale + 1e-30)).clamp_min(-_SHUT))

    def along(self, inputs: Tensor, slopes: Tensor) -> Tensor:
        """Return the update that inputs (N, C, h, w) cause with slopes (N, O, H, W)."""
        # Faster than torch's own gradient of a convolution's weight.
        rows = slopes.flatten(2).transpose(0, 1).flatten(1)
        return (rows @ self._patches(inputs)).view_as(self.update)

    def back(self, update: Tensor, slopes: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the transpose of `along`, of an update, for inputs of a shape."""
        layer = self.layer
        return conv2d_input(
            list(shape), update, slopes, layer.stride, _padding(layer), layer.dilation
        )

    def across(self, inputs: Tensor, gates: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the weighting of updates that leaves out what unsure gates may change.

        A gate that is open with probability h adds ``h (1 - h) s^2 y y'`` to the covariance of
        its channel's equations, beside the noise ``e^2``. Products are those with e^2 times
        the inverse, by Woodbury's identity.
        """
        rows = self._patches(inputs)
        spread = self.slopes * (gates * (1 - gates)).sqrt()
        spread = spread.flatten(2).transpose(0, 1).flatten(1)  # (O, N L)
        kept = max(1, round(_UNSURE * rows.shape[1]))
        _, most = spread.abs().topk(min(kept, spread.shape[1]))
        columns = rows[most] * spread.gather(1, most)[..., None]  # (O, k, q)
        noise = _NOISE**2 * self.square / self.update.numel()
        inner = columns @ columns.transpose(1, 2)
        inner.diagonal(dim1=1, dim2=2).add_(noise)
        factor = torch.linalg.cholesky(inner)
        basis = torch.linalg.solve_triangular(factor, columns, upper=False)

        def weighted(update: Tensor) -> Tensor:
            flat = update.flatten(1)[..., None]
            return (flat - basis.transpose(1, 2) @ (basis @ flat)).view_as(update)

        return weighted

    def _patches(self, inputs: Tensor) -> Tensor:
        """Return the patches of inputs (N, C, h, w), shape (N L, q)."""
        layer = self.layer
        patches = unfold(inputs, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Reached:
    """What a run of the model reaches up to a linear layer.

    Attributes
    ----------
    features : Tensor, shape (N, D)
        What goes into the layer.
    convolution : nn.Conv2d or None
        The last one that ran.
    inputs, outputs : Tensor
        Its own, (N, C, h, w) and (N, O, H, W); empty without one.
    """

    features: Tensor
    convolution: nn.Conv2d | None
    inputs: Tensor
    outputs: Tensor


class _ReachedError(Exception):
    """Ends a run of the model at a layer."""


def reached(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor, layer: str) -> Reached:
    """Run a model on normalised images (N, C, H, W) up to a linear layer."""
    there: list[Tensor] = []
    last: list[tuple[nn.Conv2d | None, Tensor, Tensor]] = [(None, x[:0], x[:0])]

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        there.append(args[0])
        raise _ReachedError

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        last[0] = (module, args[0], output)

    handles = [model.get_submodule(layer).register_forward_pre_hook(stop)]
    handles += [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        functional_call(model, dict(weights), (x,))
    except _ReachedError:
        return Reached(there[0], *last[0])
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"the model does not run {layer}")


def last_convolution(
    model: nn.Module,
    w0: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    layer: str,
    shape: tuple[int, ...],
    features: Tensor,
    inwards: Tensor,
    left: float,
) -> Convolution | None:
    """Return the equations of the last convolution in front of a layer, if there are any.

    Only a ReLU and what is linear may be between it and the layer, such as average pooling.
    That is seen on images of noise.

    Parameters
    ----------
    model : nn.Module
    w0 : mapping of str to Tensor
    end : mapping of str to Tensor
        Those in front of the layer after the training.
    layer : str
        The linear layer's name.
    shape : tuple of int
        (C, H, W) of an image.
    features : Tensor, shape (N, D)
        The exact ones.
    inwards : Tensor, shape (N, D)
        By image, what goes back into the layer's input, times what it is worth in the update.
    left : float
        See `known_part`.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *shape, generator=generator).to(features)
    with torch.no_grad():
        seen = reached(model, w0, noise, layer)
    module = seen.convolution
    if module is None or module.groups != 1 or module.padding_mode != "zeros":
        return None
    name = next(name for name, other in model.named_modules() if other is module) + ".weight"
    if name not in end or isinstance(module.padding, str):
        return None

    def opened(back: Tensor) -> Tensor:
        """Return the transpose of what follows the ReLU, from (N, D) to (N, O, H, W)."""
        images = features.new_zeros(len(back), *shape).requires_grad_()
        with torch.enable_grad(), open_gates():
            run = reached(model, w0, images, layer)
            return torch.autograd.grad(run.features, run.outputs, back)[0]

    probe = torch.randn(seen.features.shape, generator=generator).to(features)
    one, other = probe * seen.features, opened(probe) * seen.outputs.clamp_min(0)
    if (one.sum() - other.sum()).abs() > _LINEAR * other.norm():
        return None
    positive = features > _CLOSED * features.amax(1, keepdim=True)
    update = left * w0[name].double() - end[name].double()
    return Convolution(
        module, update.to(features), opened(inwards), opened(positive.to(features)) > 0
    )


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str)
    return layer.padding

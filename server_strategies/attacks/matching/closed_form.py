"""Images that follow from a gradient by linear algebra, without a search."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_RCOND = 1e-4  # relative singular value below which directions are rounding
_ADDS_UP = 0.05  # relative tolerance of the tokens' gradients, which sum to the bias's


def image_of(
    model: nn.Module, gradient: Mapping[str, Tensor], shape: tuple[int, int, int]
) -> Tensor | None:
    """Return the image that a gradient determines in closed form, shape (1, C, H, W), if it does.

    From a first linear layer, see `linear_inputs`, or from embedded patches with learned
    positions, see `patch_inputs`.

    Parameters
    ----------
    model : nn.Module
        Of known architecture.
    gradient : mapping of str to Tensor
        Of the loss of one image, by parameter name; NaN where it is not known.
    shape : tuple of int
        (C, H, W) of the image.
    """
    linear = first_linear(model)
    if linear:
        rows = linear_inputs(gradient[f"{linear}.weight"], gradient[f"{linear}.bias"])
        if rows.shape[1] != math.prod(shape) or not len(rows):
            return None
        # All rows are the same image. The median removes rounding and masked pixels.
        return rows.nanmedian(0).values.nan_to_num().view(1, *shape)
    embedding = patch_embedding(model, shape)
    if embedding is None:
        return None
    patches, positions = embedding
    weight, bias = gradient[f"{patches}.weight"], gradient.get(f"{patches}.bias")
    height, width = (side // size for side, size in zip(shape[1:], weight.shape[2:], strict=True))
    slopes = gradient[positions][0, -height * width :]
    if bias is not None:
        # Not so if another layer is between the patches and their positions.
        off = (slopes.sum(0) - bias).nan_to_num().norm()
        if off > _ADDS_UP * bias.nan_to_num().norm():
            return None
    found = patch_inputs(weight, slopes)
    if found is None:
        return None
    grid = found.view(height, width, *weight.shape[1:])
    return grid.permute(2, 0, 3, 1, 4).reshape(1, *shape)


def linear_inputs(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """Return a linear layer's input as it follows from each of its units.

    For one image ``dL/dW_i = (dL/db_i) x``, so ``x = dL/dW_i / dL/db_i`` for
    every unit i that it activates (Phong et al., 2018). For several images a row
    is their mean, weighted by their dL/db_i.

    Parameters
    ----------
    weight_gradient : Tensor, shape (out, in)
    bias_gradient : Tensor, shape (out,)

    Returns
    -------
    Tensor, shape (units with a gradient, in)
        One row a unit whose bias has a gradient that is not zero.
    """
    alive = bias_gradient.abs() > 0  # drops NaN too
    return weight_gradient[alive] / bias_gradient[alive, None]


def patch_inputs(weight_gradient: Tensor, slopes: Tensor) -> Tensor | None:
    """Return the patches that were embedded, by the gradient of their learned positions.

    A token is ``e_t = W x_t + b + p_t``, so ``dL/dp_t = dL/de_t`` and ``dL/dW = sum_t
    dL/de_t x_t``: as many equations for each pixel of a patch as the embedding is wide,
    in as many unknowns as there are patches. They are solved by least squares. That
    positions reveal tokens is the idea of APRIL (Lu et al., 2022), there by the first
    attention layer.

    Parameters
    ----------
    weight_gradient : Tensor, shape (D, C, P, P)
    slopes : Tensor, shape (T, D)
        dL/dp_t. In both NaN where it is not known.

    Returns
    -------
    Tensor, shape (T, C, P, P), or None
        None: fewer than T of the D equations are completely known.
    """
    rows = weight_gradient.flatten(1)
    known = ~(slopes.isnan().any(0) | rows.isnan().any(1))
    if known.sum() < len(slopes):
        return None
    # The tokens' gradients are nearly equal, so their differences need double precision.
    solver = torch.linalg.pinv(slopes[:, known].T.double(), rtol=_RCOND)
    found = solver @ rows[known].double()
    return found.to(rows).view(len(slopes), *weight_gradient.shape[1:])


def first_linear(model: nn.Module) -> str | None:
    """Return the name of a model's first layer with parameters if it is linear, with a bias.

    First in the order of registration, which is the order of use in
    `fl_app.models`.
    """
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            linear = isinstance(module, nn.Linear) and module.bias is not None
            return name if linear else None
    return None


def patch_embedding(model: nn.Module, shape: tuple[int, int, int]) -> tuple[str, str] | None:
    """Return the names of a model's patch embedding and of its learned positions, if it has both.

    The first convolution, without overlap, and a parameter with a row of its width for
    each of the image's patches, possibly after one for a class token.

    Parameters
    ----------
    model : nn.Module
    shape : tuple of int
        (C, H, W) of an image.
    """
    convolutions = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    name, first = next(convolutions, (None, None))
    if name is None or first is None or first.stride != first.kernel_size:
        return None
    height, width = (side // size for side, size in zip(shape[1:], first.kernel_size, strict=True))
    for positions, parameter in model.named_parameters():
        rows = parameter.shape[1] if parameter.dim() == 3 else 0
        if 0 <= rows - height * width <= 1 and parameter.shape[2] == first.out_channels:
            return name, positions
    return None

"""ReLU's surrogate second derivative: only second derivatives differ, and by the formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.gradient import loss_gradient
from server_strategies.attacks.matching.relu_smoothing import smooth_relu


class _Functional(nn.Module):
    """Two linear layers with `F.relu` between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


def _as_modules(source: _Functional, inplace: bool) -> nn.Module:
    return nn.Sequential(source.first, nn.ReLU(inplace), source.last)


def _matching(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return a loss's gradient in the weights, and the gradient of its sum in x."""
    x = x.clone().requires_grad_()
    weights = {name: w.detach().requires_grad_() for name, w in model.named_parameters()}
    gradient = loss_gradient(model, weights, x, torch.tensor([0, 2]), LocalTraining())
    (slope,) = torch.autograd.grad(sum((g.sum() for g in gradient), torch.zeros(())), x)
    return [g.detach() for g in gradient], slope


@pytest.mark.parametrize("inplace", [None, False, True])
def test_values_and_gradients_stay_and_the_second_derivative_gains_the_surrogate(
    inplace: bool | None,
) -> None:
    torch.manual_seed(0)
    network = _Functional().double()
    model = network if inplace is None else _as_modules(network, inplace)
    x, width = torch.randn(2, 5, dtype=torch.float64), 0.7
    value, (gradient, slope) = model(x), _matching(model, x)
    smooth_relu(model, width)
    smoothed_gradient, smoothed = _matching(model, x)

    assert torch.equal(model(x), value)
    assert all(map(torch.equal, smoothed_gradient, gradient))
    # The gradients of the first layer are sum_n (g_n H(z_n)) (x_n, 1). Of their sum, the part
    # that goes through H is, for each example, sum_u g_u N(z_u) (sum x + 1) first_u.
    w, z = network.first.weight.detach(), network.first(x).detach()
    error = F.softmax(value, 1).detach() - F.one_hot(torch.tensor([0, 2]), 3)
    g = error / 2 @ network.last.weight.detach()
    scale = width * z.square().mean().sqrt()
    density = torch.exp(-0.5 * (z / scale) ** 2) / (math.sqrt(2 * math.pi) * scale)
    expected = (x.sum(1, keepdim=True) + 1) * (g * density) @ w
    torch.testing.assert_close(smoothed - slope, expected)


def test_a_negative_width_is_refused() -> None:
    with pytest.raises(ValueError, match="relu_smoothing is -1"):
        smooth_relu(nn.ReLU(), -1.0)

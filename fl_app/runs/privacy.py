"""What DP-SGD guarantees, counted without trust in how batches are drawn. Free of torch."""

from __future__ import annotations

import math


def epsilon_of(noise: float, times: int, delta: float) -> float:
    """Return the epsilon of Gaussian mechanisms that each see an image once.

    Of Renyi differential privacy ``times alpha / (2 noise^2)`` at every order alpha (Mironov,
    2017, arXiv:1702.07476, corollary 3 and proposition 1), and so of

    ``epsilon = rho + 2 sqrt(rho ln(1 / delta))`` with ``rho = times / (2 noise^2)``

    (its proposition 3, at the best order). Data sets are neighbours where an image's clipped
    gradients are in one and not in the other. That batches are drawn at random is given no
    credit: the usual accounting (`client_app.defended_steps.epsilon`) is of independent draws, and
    no bound for clients that cut a shuffle into batches (Chua et al., 2024, arXiv:2403.17673).

    Parameters
    ----------
    noise : float
        Standard deviation in units of the clipping bound, > 0.
    times : int
        Noisy sums that one image is in at most, 1 or more.
    delta : float
        In (0, 1).
    """
    rho = times / (2 * noise**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def noise_for(epsilon: float, times: int, delta: float) -> float:
    """Return the noise at which `epsilon_of` is an epsilon, > 0."""
    leeway = math.log(1 / delta)
    return math.sqrt(times / 2) / (math.sqrt(leeway + epsilon) - math.sqrt(leeway))

"""The rank of a linear layer's update, and the subspaces of its terms.

Over K steps of plain or momentum SGD the update of a linear layer with a bias is exactly
``[dW, db] = sum_n d_n [a_n, 1]'``: a_n are the features that image n gives the layer at
its own step's weights, d_n the slopes of its loss at the layer's output, times the rate.
So the update has rank N, whatever its size is. Below the N-th singular value there is
only the rounding of float32, or what a defence has added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_app.protocol import LocalTraining
from server_strategies.attacks.matching.optimizers import Sgd

Matrix = NDArray[np.float64]

_ABOVE_NOISE = 4.0  # singular value over that of noise, from which it is a term's
_NOISE_FALLS = 3.0  # ratio up to which two singular values of noise may differ


@dataclass(frozen=True)
class Spectrum:
    """A linear layer's update by its singular values, ``[dW, db] = U diag(s) V'`` and noise.

    Attributes
    ----------
    left : array, shape (out, r)
        U.
    sizes : array, shape (r,)
        s, descending; r is the number of singular values above the noise's.
    right : array, shape (in, r)
        V without its last row.
    bias : array, shape (r,)
        V's last row, which belongs to the layer's bias.
    noise : float
        The largest singular value below them.
    """

    left: Matrix
    sizes: Matrix
    right: Matrix
    bias: Matrix
    noise: float

    @property
    def rank(self) -> int:
        """The number r of singular values above the noise's."""
        return len(self.sizes)

    @property
    def entry_noise(self) -> float:
        """Standard deviation of the noise in an entry of the update.

        The largest singular value of noise of deviation s in an (m, n) matrix is about
        ``s (sqrt(m) + sqrt(n))``.
        """
        rows, columns = len(self.left), len(self.right) + 1
        return self.noise / float(rows**0.5 + columns**0.5)

    @property
    def gap(self) -> float:
        """The least singular value that is kept, over the noise's; at most 1e12."""
        return float(self.sizes[-1] / max(self.noise, 1e-12 * self.sizes[-1]))


def known_part(training: LocalTraining, num_steps: int) -> tuple[float, list[float]]:
    """Return what of w0 is left in w1, and what a gradient of each step is worth in it.

    ``w1 = left w0 - sum_k worth_k g_k``. SGD is linear in weights and gradients, so the
    numbers follow from its own recurrence on numbers: of momentum, Nesterov and weight
    decay, by which `left` is below 1.

    Parameters
    ----------
    training : LocalTraining
        With SGD.
    num_steps : int
        K.
    """

    def last(weight: float, gradients: list[float]) -> float:
        optimizer, w = Sgd(training), [torch.tensor(weight, dtype=torch.float64)]
        for g in gradients:
            w = optimizer.step(w, [torch.tensor(g, dtype=torch.float64)])
        return w[0].item()

    none = [0.0] * num_steps
    steps = range(num_steps)
    return last(1.0, none), [-last(0.0, [float(k == step) for k in steps]) for step in steps]


def spectrum(weight: Tensor, bias: Tensor, terms: int) -> Spectrum | None:
    """Return the spectrum of a linear layer's update; None: it is not of low rank.

    The singular values after the `terms` largest ones are noise, of rounding or of a
    defence, and those of noise fall slowly.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
        The update, without its `known_part`.
    bias : Tensor, shape (out,)
    terms : int
        Terms that the sum has.
    """
    update = torch.cat([weight, bias[:, None]], 1).double()
    live = update.any(1)
    if int(live.sum()) <= terms + 1 or update.shape[1] <= terms + 1:
        return None
    left, sizes, right = torch.linalg.svd(update[live], full_matrices=False)
    noise, after = sizes[terms].item(), sizes[terms + 1].item()
    kept = int((sizes[:terms] > _ABOVE_NOISE * noise).sum())
    if not kept or noise > _NOISE_FALLS * after + 1e-12 * sizes[0].item():
        return None
    everywhere = update.new_zeros(len(update), kept)
    everywhere[live] = left[:, :kept]
    rows = right[:kept].T
    return Spectrum(
        everywhere.cpu().numpy(),
        sizes[:kept].cpu().numpy(),
        rows[:-1].cpu().numpy(),
        rows[-1].cpu().numpy(),
        noise,
    )

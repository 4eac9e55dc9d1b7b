"""Kernel ridge regression, with everything chosen by leaving training rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

KERNELS = ("linear", "gaussian")
_RIDGES = tuple(10 ** (power / 2) for power in range(-6, 3))  # times the kernel's mean diagonal
_CHOICE = 1000  # rows on which kernel and ridge are chosen, and the error is estimated
_THUMBNAIL = 8  # height and width of the targets by which they are chosen


@dataclass(frozen=True)
class Block:
    """One kind of input of the regression.

    Attributes
    ----------
    parts : sequence of (Tensor (n, d), Tensor (m, d))
        Of the n training rows and of the m rows to predict, by layer of the model. Every
        part counts alike, however many numbers it has.
    """

    parts: Sequence[tuple[Tensor, Tensor]]

    def standardised(self) -> tuple[Tensor, Tensor]:
        """Return all parts side by side, centred, and each of a mean square norm of 1 a row."""
        learned, asked = [], []
        for train, test in self.parts:
            mean = train.mean(0)
            size = (train - mean).square().sum(1).mean().sqrt().clamp(min=1e-12)
            learned.append((train - mean) / size)
            asked.append((test - mean) / size)
        return torch.cat(learned, 1), torch.cat(asked, 1)


@dataclass(frozen=True)
class Regressed:
    """What a regression predicts.

    Attributes
    ----------
    images : Tensor, shape (m, C, H, W)
    psnr : float
        Expected PSNR in dB: the mean over training images, each predicted without its group.
    blocks, kernel : str
        What was chosen, by this PSNR.
    ridge : float
        In units of the kernel's mean diagonal.
    """

    images: Tensor
    psnr: float
    blocks: str
    kernel: str
    ridge: float


def regress(blocks: Mapping[str, Block], images: Tensor, group: int) -> Regressed:
    """Predict images from blocks by kernel ridge regression.

    ``x(a) = m + k(a)' (K + r I)^-1 (X - m)``, with the training images X, their mean m, and
    a linear kernel or ``exp(-|a - b|^2 / 2 s^2)`` with s the median distance. One block
    or all of them, the kernel and r are those of the least error on rows that are left
    out. The error of leaving a group g out has a closed form (Rifkin & Lippert, 2007, by
    block): ``(C_gg)^-1 (C (X - m))_g`` with ``C = (K + r I)^-1``.

    Parameters
    ----------
    blocks : mapping of str to Block
        By name, one or more; of all the same rows.
    images : Tensor, shape (n, M, C, H, W)
        Training images in [0, 1]; M of a row, of which the mean is predicted.
    group : int
        Consecutive training rows that share what they are predicted from, such as the
        images of one batch; n is a multiple of it.
    """
    chosen = group * max(1, min(_CHOICE, len(images)) // group)
    small = F.adaptive_avg_pool2d(images.flatten(0, 1), _THUMBNAIL).reshape(*images.shape[:2], -1)
    best: tuple[float, str, str, float] | None = None
    names = [(name,) for name in blocks] + [tuple(blocks)] * (len(blocks) > 1)
    sides = {each: _joined([blocks[name] for name in each]) for each in names}
    for each, (learned, _) in sides.items():
        for kernel in KERNELS:
            gram = _kernel(kernel, learned[:chosen], learned[:chosen], learned)
            values, vectors = torch.linalg.eigh(gram)
            for ridge in _RIDGES:
                inverse = (vectors / (values.clamp(min=0) + ridge)) @ vectors.T
                score = _psnr(inverse, small[:chosen], group)
                if best is None or score > best[0]:
                    best = (score, " + ".join(each), kernel, ridge)
    assert best is not None
    _, words, kernel, ridge = best
    learned, asked = sides[tuple(words.split(" + "))]
    gram = _kernel(kernel, learned, learned, learned)
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    psnr = _psnr(inverse, images.flatten(2), group)
    rows = images.mean(1).flatten(1)
    weights = _kernel(kernel, asked, learned, learned) @ inverse
    predicted = rows.mean(0) + weights @ (rows - rows.mean(0))
    return Regressed(predicted.view(-1, *images.shape[2:]).clamp(0, 1), psnr, words, kernel, ridge)


def _joined(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    learned, asked = zip(*(block.standardised() for block in blocks), strict=True)
    return torch.cat(learned, 1), torch.cat(asked, 1)


def _kernel(kind: str, a: Tensor, b: Tensor, learned: Tensor) -> Tensor:
    """Return the kernel of rows a and b, of mean diagonal 1 on those that are learned from."""
    if kind == "linear":
        return a @ b.T / learned.square().sum(1).mean()
    some = learned[:: max(1, len(learned) // 300)]
    scale = torch.pdist(some).median().clamp(min=1e-12)
    return (-(torch.cdist(a, b) / scale).square() / 2).exp()


def _psnr(inverse: Tensor, images: Tensor, group: int) -> float:
    """Return the mean PSNR of the first images, their rows predicted without their group.

    Parameters
    ----------
    inverse : Tensor, shape (n, n)
        ``(K + r I)^-1``.
    images : Tensor, shape (n, M, P)
    group : int
    """
    count = group * max(1, min(_CHOICE, len(images)) // group)
    rows = images.mean(1)
    residual = (inverse[:count] @ (rows - rows.mean(0))).unflatten(0, (-1, group))
    firsts = range(0, count, group)
    own = torch.stack([inverse[i : i + group, i : i + group] for i in firsts])
    predicted = (rows[:count] - torch.linalg.solve(own, residual).flatten(0, 1)).clamp(0, 1)
    mse = (predicted[:, None] - images[:count]).square().mean(2).clamp(min=1e-10)
    return float((-10 * mse.log10()).mean())

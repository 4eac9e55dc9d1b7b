"""Kernel ridge regression: the closed form of leaving out, and what is chosen."""

from __future__ import annotations

import torch

from server_strategies.attacks.regression.kernel import Block, _kernel, _psnr, regress


def test_leaving_a_group_out_is_refitting_without_it() -> None:
    torch.manual_seed(0)
    rows, images = torch.randn(12, 5), torch.rand(12, 1, 7)
    gram = _kernel("linear", rows, rows, rows) + 0.1 * torch.eye(12)
    psnr = []
    mean = images.mean((0, 1))  # of all, as in the prediction
    for first in range(0, 12, 3):
        out = torch.arange(first, first + 3)
        rest = torch.tensor([i for i in range(12) if i not in out])
        alpha = torch.linalg.solve(gram[rest][:, rest], images[rest, 0] - mean)
        found = (mean + gram[out][:, rest] @ alpha).clamp(0, 1)
        psnr.append(-10 * (found - images[out, 0]).square().mean(1).log10())
    found_psnr = _psnr(torch.linalg.inv(gram), images, 3)
    assert abs(found_psnr - float(torch.cat(psnr).mean())) < 1e-3


def test_what_tells_of_the_images_is_chosen_and_they_are_predicted() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(500, 4)
    images = (0.5 + 0.1 * hidden @ torch.randn(4, 3 * 8 * 8)).clamp(0, 1).view(-1, 1, 3, 8, 8)
    noise = torch.randn(500, 9)
    told = hidden @ torch.randn(4, 9) + 0.3 * torch.randn(500, 9)
    blocks = {
        name: Block([(each[:480], each[480:])]) for name, each in (("noise", noise), ("told", told))
    }
    found = regress(blocks, images[:480], 1)
    psnr = -10 * (found.images - images[480:, 0]).square().mean((1, 2, 3)).log10()
    assert (found.blocks, found.images.shape) == ("told", (20, 3, 8, 8))
    assert psnr.mean() > 22
    assert abs(psnr.mean() - found.psnr) < 1  # without the truth

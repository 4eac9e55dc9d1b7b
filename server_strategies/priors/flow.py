"""The flow-matching prior: a generative image prior, learned from natural images.

Straight paths x_t = t x1 + (1 - t) x0 from noise x0 ~ N(0, I) to images x1 in
[-1, 1]; the network v(x_t, t) regresses x1 - x0 (the paper, eq. 2 and 3), so
that D(x_t, t) = x_t + (1 - t) v(x_t, t) is a denoiser.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_app.registry import PRIORS
from fl_app.util.reading import BrokenFileError
from fl_app.util.tensors import read_tensors
from server_strategies.priors.networks import create_network
from server_strategies.priors.places import find_weights
from server_strategies.priors.tiles import Tiled

MODES = ("denoiser", "velocity")
_AT_ONCE = 128  # images in one call of the network; only bounds the memory
TRAINED_SIZE = 32  # image size of weights whose metadata lack it, as older files do


def load_flow(weights: str, device: torch.device | str = "cpu", fetch: bool = True) -> nn.Module:
    """Load a trained velocity network, frozen.

    Parameters
    ----------
    weights : str
        A name in the registry of priors, or a file or a repository on the hub, see
        `find_weights`.
    device : torch.device or str
    fetch : bool
        See `find_weights`.

    Returns
    -------
    nn.Module
        v(x_t, t). Its attribute ``size`` is the height and width of its training images,
        ``multiple`` what its images' sides are multiples of, and ``facts`` what the file
        says of the training, as its model card does.

    Raises
    ------
    ValueError
        If there are no such weights, or they do not fit their network.
    """
    if weights in PRIORS:
        return PRIORS[weights](device)
    return load_weights(find_weights(weights, fetch), device)


def load_weights(path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load the velocity network of a ``.safetensors`` file, see `load_flow`.

    Raises
    ------
    ValueError
        If the file can't be read or does not fit its network.
    """
    try:
        tensors, facts = read_tensors(path)
    except BrokenFileError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    state = {key: tensor.float() for key, tensor in tensors.items()}
    name, size = facts.get("network", ""), facts.get("image_size", str(TRAINED_SIZE))
    network = create_network(name)
    if not size.isdecimal() or int(size) < 2 or int(size) % int(network.multiple):  # type: ignore[arg-type]
        raise ValueError(
            f"{path}: image_size is {size!r}; allowed: a multiple of {network.multiple}"
        )
    network.size, network.facts = int(size), facts  # type: ignore[assignment]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the network {name!r}: {error}") from error
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def denoise(network: nn.Module, x_t: Tensor, level: float) -> Tensor:
    """Return the denoiser ``D(x_t, t) = x_t + (1 - t) v(x_t, t)``, the mean of x1 given x_t.

    Parameters
    ----------
    network : nn.Module
        The velocity v(x_t, t).
    x_t : Tensor, shape (N, 3, H, W)
        ``t x1 + (1 - t) x0``, with x1 in [-1, 1] and x0 from N(0, I).
    level : float
        The flow time t in [0, 1] of all images.

    Returns
    -------
    Tensor, shape (N, 3, H, W)
    """
    t = x_t.new_full((len(x_t),), level)
    return x_t + (1 - level) * network(x_t, t)


def generate(network: nn.Module, noise: Tensor, steps: int) -> Tensor:
    """Follow dx/dt = v(x, t) from noise at t = 0 to images at t = 1 (the paper, eq. 1).

    Parameters
    ----------
    network : nn.Module
        The velocity v(x_t, t).
    noise : Tensor, shape (N, 3, H, W)
        x0 from N(0, I).
    steps : int
        Euler steps of length 1 / steps.

    Returns
    -------
    Tensor, shape (N, 3, H, W)
        About in [-1, 1]; differentiable in the noise.
    """
    x = noise
    for step in range(steps):
        x = x + network(x, x.new_full((len(x),), step / steps)) / steps
    return x


def fit(x: Tensor, multiple: int) -> Tensor:
    """Return images in the shape that a velocity network takes: three channels, sides that fit.

    A greyscale image is repeated over the channels. Height and width grow to the next
    multiples by reflection at the edges, equally on both sides or nearly so.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        C is 1 or 3.
    multiple : int
        The network's.

    Returns
    -------
    Tensor, shape (N, 3, H', W')

    Raises
    ------
    ValueError
        If C is another, or a side is too short to be reflected.
    """
    down, across = (-side % multiple for side in x.shape[-2:])
    short = any(
        (grown + 1) // 2 >= side
        for grown, side in zip((down, across), x.shape[-2:], strict=True)
        if grown
    )
    if x.dim() != 4 or x.shape[1] not in (1, 3) or short:
        raise ValueError(
            "the flow prior takes images (N, C, H, W) with C 1 or 3, H and W divisible by "
            f"{multiple} or more than {multiple // 2}, got {tuple(x.shape)}"
        )
    sides = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(x.expand(-1, 3, -1, -1), sides, mode="reflect")


def unfit(fitted: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return the part of `fit`'s result that is the image; of a greyscale one the channels' mean.

    Parameters
    ----------
    fitted : Tensor, shape (N, 3, H', W')
    channels, height, width : int
        The image's; C is 1 or 3.

    Returns
    -------
    Tensor, shape (N, C, H, W)
    """
    top, left = (fitted.shape[-2] - height) // 2, (fitted.shape[-1] - width) // 2
    inner = fitted[..., top : top + height, left : left + width]
    return inner.mean(1, keepdim=True) if channels == 1 else inner


class FlowPrior:
    """A penalty on the distance of images from the manifold of natural images.

    ``denoiser``: ``weight mean|x - D(t x + (1 - t) e, t)|^2`` with fresh noise e
    and D held constant, so that nothing is back-propagated through the network
    (Romano et al., 2017, RED; Poole et al., 2023, score distillation).
    ``velocity``: ``weight mean|v(x, t)|^2``, back-propagated (the paper, eq. 17).

    A greyscale image is repeated over the three channels, and D is averaged over them,
    so that its gradient is the mean of theirs. Where a side does not fit the network,
    the image is padded by reflection (`fit`), and the padding does not enter the
    penalty. Images larger than those of the training are denoised as a whole, since the
    network is convolutional, or in tiles (`Tiled`).

    An instance counts its calls and keeps D between them: it serves one attack.

    Parameters
    ----------
    network : nn.Module
        From `load_flow`.
    weight : float
        Of the mean over pixels in [-1, 1].
    mode : {"denoiser", "velocity"}
    t_start, t_end : float
        Flow time at the first and the last iteration, linear between; in (0, 1].
    generator : torch.Generator
        Draws e, on the images' device.
    every : int
        In `denoiser` mode the network runs in every m-th call only, the first
        among them; in between the penalty uses the last D. 1 or more.
    draws : int
        In `denoiser` mode D is the mean over that many draws of e. 1 or more.
    polish : float
        Share of the iterations, the last ones, in which the weight is 0; in [0, 1).
    tiles : bool
        Whether images larger than the network was trained on are cut into tiles of that
        size.

    Raises
    ------
    ValueError
        If an argument is out of range, or `every` or `draws` is above 1 in `velocity`
        mode, which keeps no D and draws no noise.
    """

    def __init__(
        self,
        network: nn.Module,
        weight: float,
        mode: str,
        t_start: float,
        t_end: float,
        generator: torch.Generator,
        every: int = 1,
        draws: int = 1,
        polish: float = 0.0,
        tiles: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
        for name, time in (("t_start", t_start), ("t_end", t_end)):
            if not 0 < time <= 1:
                raise ValueError(f"{name} is {time}; allowed: above 0, at most 1")
        most = "" if mode == "denoiser" else f" with mode {mode}"
        for name, number in (("every", every), ("draws", draws)):
            if number % 1 or number < 1 or (most and number > 1):
                allowed = "1" if most else "a whole number from 1"
                raise ValueError(f"{name} is {number}; allowed{most}: {allowed}")
        if not 0 <= polish < 1:
            raise ValueError(f"polish is {polish}; allowed: from 0, below 1")
        self.multiple = int(network.multiple)  # type: ignore[arg-type]
        if tiles:  # displaced by a generator on the CPU, so that no call waits for the device
            network = Tiled(network, torch.Generator().manual_seed(generator.initial_seed()))
        self.network = network
        self.weight = weight
        self.mode = mode
        self.t_start, self.t_end = t_start, t_end
        self.generator = generator
        self.every, self.draws = int(every), int(draws)
        self.polish = polish
        self._calls = 0
        self._denoised: Tensor

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the penalty, shape ().

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            In [0, 1]; C is 1 or 3; the same shape in every call.
        progress : float
            Share of the attack's iterations done, in [0, 1].

        Raises
        ------
        ValueError
            If the network can't take images of this shape (`fit`).
        """
        if self.polish and progress >= 1 - self.polish:
            return 0 * images.sum()
        x, shape = 2 * images - 1, images.shape[1:]
        level = self.t_start + (self.t_end - self.t_start) * progress
        if self.mode == "velocity":
            velocity = self.network(fit(x, self.multiple), x.new_full((len(x),), level))
            return self.weight * unfit(velocity, 3, *shape[1:]).square().mean()
        if self._calls % self.every == 0:
            self._denoised = unfit(self._denoise(fit(x.detach(), self.multiple), level), *shape)
        self._calls += 1
        return self.weight * F.mse_loss(x, self._denoised)

    @torch.no_grad()
    def _denoise(self, x: Tensor, level: float) -> Tensor:
        """Return D at x, shape (N, 3, H, W), the mean over draws of the noise."""
        shape = (self.draws, *x.shape)
        noise = torch.randn(shape, generator=self.generator, device=x.device, dtype=x.dtype)
        parts = torch.lerp(noise, x, level).flatten(0, 1).split(_AT_ONCE)
        denoised = torch.cat([denoise(self.network, part, level) for part in parts])
        return denoised.unflatten(0, (self.draws, -1)).mean(0)

"""LPIPS, with weights from a local folder, torchvision's cache or its download.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018. The package `lpips` ships the linear heads; the trunks are
torchvision's ImageNet weights. Without those there is no metric: a random
trunk would give numbers that look like LPIPS and are not.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_app.util.files import user_path
from fl_app.util.tensors import read_tensors
from fl_app.util.vision import import_lpips, import_torchvision

# Metric's name: lpips' name of the net, torchvision's weights, smallest image
# side that its pooling leaves something of (both take 32 x 32 as it is).
_NETS = {
    "lpips_vgg": ("vgg", "VGG16_Weights", "vgg16", 16),
    "lpips_alex": ("alex", "AlexNet_Weights", "alexnet", 31),
}
_DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer; offline must not mean waiting
_CHUNK = 32  # images at once, to bound the memory of VGG's first layers


def load_lpips(folder: str = "") -> tuple[dict[str, Lpips], dict[str, str]]:
    """Load both LPIPS networks, as far as their weights are available.

    Parameters
    ----------
    folder : str
        Holds ``alexnet_features.safetensors`` and ``vgg16_features.safetensors``
        with torchvision's names ``features.*``, in any float type; for its path
        see `user_path`. Empty: the cache of torch.hub. ``download``: the cache,
        else torchvision's download (233 and 528 MB), which no first run should
        wait for unasked.

    Returns
    -------
    measures : dict
        By metric name.
    reasons : dict
        By metric name, why it is not in `measures`.
    """
    measures: dict[str, Lpips] = {}
    reasons: dict[str, str] = {}
    for name in _NETS:
        try:
            measures[name] = Lpips(name, folder)
        # Whatever ails the weights, the audit goes on without this metric and says why.
        except Exception as error:
            source = folder or "torch.hub's cache (lpips_weights=download would fetch them)"
            reasons[name] = f"no trunk weights from {source}: {type(error).__name__}: {error}"
    return measures, reasons


def _trunk_weights(name: str, folder: str) -> dict[str, Tensor]:
    _, enum, file, _ = _NETS[name]
    if folder not in ("", "download"):
        return read_tensors(user_path(folder) / f"{file}_features.safetensors")[0]
    url = getattr(import_torchvision().models, enum).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not folder and not cached.exists():
        raise FileNotFoundError(f"{cached} does not exist")
    # torch.hub offers no timeout of its own.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    finally:
        socket.setdefaulttimeout(before)


def _network(name: str, weights: dict[str, Tensor]) -> nn.Module:
    """Build LPIPS with its own heads, and put `weights` into its trunk."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it calls torchvision the old way
        network = import_lpips().LPIPS(net=_NETS[name][0], pnet_rand=True, verbose=False)
    # lpips cuts `features` into slices but keeps the layers' numbers as names:
    # net.slice2.3.weight is features.3.weight.
    trunk = {key: weights["features." + key.partition(".")[2]] for key in network.net.state_dict()}
    network.net.load_state_dict(trunk)
    return network.requires_grad_(False)


class Lpips:
    """The distance LPIPS of pairs of images, and the features that it is a distance of.

    Parameters
    ----------
    name : str
        The metric's.
    folder : str
        See `load_lpips`.
    """

    def __init__(self, name: str, folder: str) -> None:
        self._network = _network(name, _trunk_weights(name, folder))
        self._name = name

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the N distances of images in [0, 1], shape (N, C, H, W), C 1 or 3.

        Raises
        ------
        ValueError
            If a side of the images is too small for the network.
        """
        pairs = zip(images.split(_CHUNK), others.split(_CHUNK), strict=True)
        return torch.cat([(self.features(a) - self.features(b)).square().sum(1) for a, b in pairs])

    def takes(self, shape: Sequence[int]) -> bool:
        """Say whether images (..., H, W) are large enough for the network."""
        return min(shape[-2:]) >= _NETS[self._name][3]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features, shape (N, D), whose squared distance is LPIPS.

        LPIPS is ``sum_l mean_hw sum_c w_lc (a_lchw - b_lchw)^2`` of activations a and b of
        unit length over the channels, with weights w >= 0: so the features are
        ``sqrt(w_lc / (H_l W_l)) a_lchw``, and those of an image are computed once, however
        many it is compared with.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            In [0, 1], C 1 or 3.

        Raises
        ------
        ValueError
            If a side of the images is too small for the network.
        """
        if not self.takes(images.shape):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}; {self._name} needs sides of "
                f"{_NETS[self._name][3]} or more"
            )
        return torch.cat([self._chunk(chunk) for chunk in images.split(_CHUNK)])

    def _chunk(self, images: Tensor) -> Tensor:
        network: Any = self._network
        # One channel is repeated to three by broadcasting in lpips' scaling layer.
        layers = network.net(network.scaling_layer(2 * images - 1))
        return torch.cat(
            [
                (_unit(layer) * (head.model[-1].weight / layer[0, 0].numel()).sqrt()).flatten(1)
                for layer, head in zip(layers, network.lins, strict=True)
            ],
            dim=1,
        )


def _unit(layer: Tensor) -> Tensor:
    """Return activations (N, C, H, W) of length 1 over the channels, as lpips has it."""
    return layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10)

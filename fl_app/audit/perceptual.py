"""LPIPS, with weights from a local folder, torchvision's cache or its download.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018. The package `lpips` ships the linear heads; the trunks are
torchvision's ImageNet weights. Without those there is no metric: a random
trunk would give numbers that look like LPIPS and are not.
"""

from __future__ import annotations

import socket
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fl_app.audit.metrics import Measure
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


def load_lpips(folder: str = "") -> tuple[dict[str, Measure], dict[str, str]]:
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
        By metric name; each takes two batches of shape (N, C, H, W) in [0, 1],
        C 1 or 3, and returns the N distances.
    reasons : dict
        By metric name, why it is not in `measures`.
    """
    measures: dict[str, Measure] = {}
    reasons: dict[str, str] = {}
    for name in _NETS:
        try:
            measures[name] = _measure(name, folder)
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


def _measure(name: str, folder: str) -> Measure:
    network = _network(name, _trunk_weights(name, folder))
    smallest = _NETS[name][3]

    @torch.no_grad()
    def distance(images: Tensor, others: Tensor) -> Tensor:
        if min(images.shape[-2:]) < smallest:
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}; {name} needs sides of {smallest} or more"
            )
        pairs = zip(images.split(_CHUNK), others.split(_CHUNK), strict=True)
        # One channel is repeated to three by broadcasting in lpips' scaling layer.
        return torch.cat([network(2 * a - 1, 2 * b - 1).flatten() for a, b in pairs])

    return distance

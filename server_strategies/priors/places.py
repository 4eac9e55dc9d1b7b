"""Where the weights of a prior are: shipped, in a file of one's own, or on the hub."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path

from fl_app.config import HUB
from fl_app.registry import OURS, PRIORS
from fl_app.util.extras import extras
from fl_app.util.files import project_file, user_path

HUB_FILE = "model.safetensors"
"""The file that holds the weights there."""
FOLDER = "server_strategies/priors/weights"
IN_GIT_ALONE = ("unet64",)
"""Shipped priors that are too large for the wheel: a checkout holds them."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def shipped_weights(name: str) -> Path:
    """Return the file of a shipped network; its model card is beside it, in ``.md``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is in a checkout alone, and this is none.
    """
    try:
        return project_file(f"{FOLDER}/{name}.safetensors")
    except FileNotFoundError as error:
        if name not in IN_GIT_ALONE:
            raise
        raise ValueError(
            f"the prior {name!r} is in flowleak's repository and not in its wheel: install a "
            f"checkout (pip install -e .), or give the path of its {FOLDER}/{name}.safetensors in "
            "place of the name"
        ) from error


def find_weights(weights: str, fetch: bool = True) -> Path:
    """Return the file of a trained velocity network; its model card is beside it, in ``.md``.

    Parameters
    ----------
    weights : str
        The name of a shipped prior; the path of a ``.safetensors`` file made by
        ``flowleak prior train``, see `user_path`; or ``hub:OWNER/NAME``, or
        ``hub:OWNER/NAME@REVISION``, of a repository on the Hugging Face hub, which is
        downloaded once and has no card beside it.
    fetch : bool
        Whether they may be downloaded. What a run's folder names is not: it may be anybody's.

    Raises
    ------
    ValueError
        If there are no such weights.
    """
    if weights.startswith(HUB):
        return _from_hub(weights, fetch)
    if weights.endswith(".safetensors"):
        path = user_path(weights)
        if not path.is_file():
            raise ValueError(f"prior weights {weights!r}: {path} is no file; give its whole path")
        return path
    try:
        return shipped_weights(weights)
    except FileNotFoundError as error:
        shipped = [entry.name for entry in PRIORS.entries.values() if entry.package == OURS]
        if weights in shipped:
            raise
        raise ValueError(
            f"prior weights {weights!r} are not shipped; allowed: {', '.join(shipped)}, "
            f"the path of a .safetensors file, or {HUB}OWNER/NAME"
        ) from error


def weights_name(weights: str) -> str:
    """Return what weights are called in results: a prior's or repository's name, or a file's."""
    if weights in PRIORS or weights.startswith(HUB):
        return weights
    return find_weights(weights).stem


def weights_digest(weights: str) -> str | None:
    """Return the SHA-256 of a prior's weights, None where they are in no file: a plug-in's.

    Parameters
    ----------
    weights : str
        See `load_flow`.
    """
    try:
        data = find_weights(weights, fetch=False).read_bytes()
    except (ValueError, OSError):
        return None  # or it is missing, which the attack that needs it tells
    return hashlib.sha256(data).hexdigest()


def _from_hub(weights: str, fetch: bool) -> Path:
    """Return a repository's weights in the hub's cache, downloaded where they are not there."""
    name, _, revision = weights.removeprefix(HUB).partition("@")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"prior weights {weights!r}; allowed: {HUB}OWNER/NAME[@REVISION]")
    with extras():  # slow to import, and no other weights need it
        from huggingface_hub import hf_hub_download
    download = partial(hf_hub_download, name, HUB_FILE, revision=revision or None)
    try:  # without a request: the same weights in every process of a run, and later
        return Path(download(local_files_only=True))
    except OSError as error:
        if not fetch:
            raise ValueError(
                f"prior weights {weights!r} are not on this machine, and what a run names is not "
                f"downloaded; first: hf download {name} {HUB_FILE}"
                + (f" --revision {revision}" if revision else "")
            ) from error
    try:
        return Path(download())
    except Exception as error:  # from the network, the hub or the disk
        raise ValueError(
            f"prior weights {weights!r}: no {HUB_FILE} from the hub. Cause: {error}"
        ) from error

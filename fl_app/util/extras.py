"""Packages that not everyone needs: which of flowleak's extras installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRA = {
    "opacus": "dp",
    "lpips": "lpips",
    "torchvision": "lpips",
    "cma": "cma",
    "datasets": "data",
    "flwr_datasets": "data",
    "huggingface_hub": "data",
    "PIL": "data",
    "pyarrow": "data",
    "skimage": "data",
    "matplotlib": "server",
    "ray": "server",
    "scipy": "server",
    "tensorboard": "tensorboard",
}
"""By package."""


class MissingExtraError(ValueError):
    """A package that is not installed; the message names the extra that holds it, if one does."""


@contextmanager
def extras() -> Iterator[None]:
    """Return a context in which the error of a missing package names the extra that installs it.

    Raises
    ------
    MissingExtraError
        From the context, in place of ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        words = f"{package} is not installed"
        if package in _EXTRA:
            words += f"; it comes with: pip install 'flowleak[{_EXTRA[package]}]'"
        raise MissingExtraError(words) from error

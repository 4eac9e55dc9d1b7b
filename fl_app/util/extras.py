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
    "PIL": "data",
    "skimage": "data",
}
"""By package; every other one is for the server."""


class MissingExtraError(ValueError):
    """A package that is not installed; the message names the extra that holds it."""


@contextmanager
def extras() -> Iterator[None]:
    """Return a context in which a missing package is told with the extra that installs it.

    Raises
    ------
    MissingExtraError
        From the context, in place of ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingExtraError(
            f"{package} is not installed; it comes with: "
            f"pip install 'flowleak[{_EXTRA.get(package, 'server')}]'"
        ) from error

"""What ``module:attribute`` names."""

from __future__ import annotations

import importlib
from typing import Any


def imported(target: str) -> Any:
    """Import and return what ``module:attribute`` names; the attribute may have dots.

    Raises
    ------
    Exception
        Whatever the module's code raises, ImportError and AttributeError among it.
    """
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found

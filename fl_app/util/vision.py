"""The one door to torchvision, and to lpips, which needs it.

The torchvision wheel of package indexes is built for CUDA. Beside a CPU-only
torch its C++ operators are missing, and then its import fails on registering
shapes for `nms`. Nothing here uses those operators, so declaring their
schemas is enough.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from fl_app.util.extras import extras

_MISSING = "operator torchvision::nms does not exist"
# The schemas live only as long as this object.
_schemas: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Import and return torchvision, whichever torch is installed.

    Raises
    ------
    MissingExtraError
        If torchvision is not installed.
    RuntimeError
        If its import fails for any reason but the missing operators.
    """
    global _schemas
    try:
        with extras():
            return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error) or _schemas is not None:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _schemas = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def import_lpips() -> ModuleType:
    """Import and return lpips, after torchvision.

    Raises
    ------
    MissingExtraError, RuntimeError
        As `import_torchvision`.
    """
    import_torchvision()
    with extras():
        return importlib.import_module("lpips")

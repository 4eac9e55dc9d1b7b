"""What a result depends on beside its settings: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any


def host() -> dict[str, Any]:
    """Return processor, cores and versions; nothing slow is imported for it."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "flowleak")},
    }


def device() -> str:
    """Return where an attack of this process runs: the GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

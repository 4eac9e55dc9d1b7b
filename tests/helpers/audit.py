"""Small truths, reconstructions and log lines, and how a table of lines is printed."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fl_app.audit.leakage_log import LogLine
from fl_app.audit.table import leakage_table
from fl_app.audit.truth import Truth
from fl_app.protocol import Reconstruction

SHAPE = (3, 32, 32)
MEAN = (0.4, 0.5, 0.6)


def images(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.rand((n, 3, size, size), generator=torch.Generator().manual_seed(seed))


def truth_of(x: torch.Tensor, batches: tuple[tuple[int, ...], ...] | None = None) -> Truth:
    n = len(x)
    return Truth(x, tuple(range(n)), batches or tuple((i,) for i in range(n)), 1, 7)


def reconstruction_of(x: torch.Tensor, labels: tuple[int, ...] | None = None) -> Reconstruction:
    return Reconstruction(
        attack="sme",
        matching="surrogate: SGD",
        images=x,
        labels=labels or tuple(range(len(x))),
        losses=(0.5, 0.25),
        iterations=2,
        seconds=0.5,
        peak_memory=1000,
        flops=2000,
        stop_reason="iterations",
        options={"lr": 1.0},
    )


def shared_lpips() -> Path:
    root = Path(os.environ.get("FLOWLEAK_SHARED", Path(__file__).parents[3] / "shared"))
    folder = root / "weights" / "lpips"
    if not folder.exists():
        pytest.skip(f"no LPIPS trunk weights at {folder}")
    return folder


def line_of(**fields: object) -> LogLine:
    line = LogLine(round=1, node="7", client=0, attack="sme", status="ok", labels="by-step")
    return replace(line, **fields)  # type: ignore[arg-type]


def printed(lines: list[dict[str, Any]], width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(leakage_table(lines))
    return console.file.getvalue()  # type: ignore[attr-defined]

"""What the documents and examples show, run as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip


def test_the_example_runs_and_is_short(tmp_path: Path) -> None:
    example = ROOT / "examples" / "attack_one_update.py"
    lines = example.read_text().splitlines()[1:]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) < 15
    run_python(str(example), folder=tmp_path)
    assert (tmp_path / "leak.png").exists()

"""The benchmark of label inference, from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_app.benchmarks import labels as label_bench
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.common import SGD
from fl_app.commands.main import app
from fl_app.config import AttackConfig
from fl_app.registry import BENCHMARKS


def test_the_benchmark_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(replace(SGD, local_steps=2, batch_size=3), AttackConfig())
    monkeypatch.setitem(BENCHMARKS, "labels", replace(label_bench.SUITE, cases=(case,)))
    monkeypatch.setattr(label_bench, "THRESHOLDS", {case.client: 1.01})
    out = tmp_path / "labels.json"
    command = ["bench", "labels", "--dataset", "photos", "--trials", "2", "--out", str(out)]
    command += ["--workers", "2"]
    shown = CliRunner().invoke(app, [*command, "--check"])
    assert shown.exit_code == 1 and "the threshold is 101%" in shown.output
    kept = json.loads(out.read_text())
    assert kept["facts"]["workers"] == 2
    rows = kept["rows"]
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, seed) for method in (*label_bench.METHODS, "auto") for seed in (0, 1)
    }
    assert all(0 <= row["chance"] <= 1 for row in rows)
    assert "| sgd 0.01 K=2 B=3 | auto | 2 | " in out.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="labels attacks with none"):
        CliRunner().invoke(app, [*command, "--prior", "unet64"], catch_exceptions=False)

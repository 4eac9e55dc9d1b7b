"""`flowleak prior`: a prior that is trained, and then attacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.command import flowleak

from fl_app.benchmarks.case import Case
from fl_app.benchmarks.suite import AttackSuite
from fl_app.config import AttackConfig
from fl_app.protocol import LocalTraining
from fl_app.registry import BENCHMARKS
from server_strategies.priors.networks import NETWORKS


def test_a_prior_is_trained_and_attacks_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), "uint8"))
    out = tmp_path / "own.safetensors"
    flowleak(
        "prior", "train", str(tmp_path / "a.npy"), "--images", "8", "--batch-size", "4",
        "--folder", str(tmp_path / "c"), "--out", str(out),
    )  # fmt: skip
    assert out.is_file()
    assert "images seen: 8" in out.with_suffix(".md").read_text()
    attack = AttackConfig("flow_matching", 1)
    case = Case(LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=2), attack)
    monkeypatch.setitem(BENCHMARKS, "quick", AttackSuite((case,)))
    monkeypatch.chdir(tmp_path)
    bench = ["bench", "quick", "--dataset", "photos", "--trials", "1", "--out", "quick.json"]
    flowleak(*bench, "--prior", "own.safetensors")
    assert json.loads(Path("quick.json").read_text())["facts"]["prior"] == "own"
    assert "--prior own" in Path("quick.md").read_text()
    with pytest.raises(ValueError, match=r"holds results of .*'prior': 'own'"):
        flowleak(*bench)
    with pytest.raises(ValueError, match="prior weights 'nonsense' are not shipped"):
        flowleak(*bench, "--prior", "nonsense")
    with pytest.raises(ValueError, match="labels attacks with none"):
        flowleak("bench", "labels", "--prior", "unet64")


def test_its_help_names_every_network() -> None:
    shown = flowleak("prior", "train", "--help")
    assert all(f"{name}: " in shown for name in NETWORKS)

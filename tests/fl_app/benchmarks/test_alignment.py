"""The benchmark of matching losses: whether their descent leads to the images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command import flowleak
from torch import Tensor

from fl_app.benchmarks.alignment import NOISES, START, SUITE, alignment
from fl_app.benchmarks.case import Case
from fl_app.config import AttackConfig
from fl_app.protocol import LocalTraining
from fl_app.registry import BENCHMARKS


def test_alignment_is_the_cosine_of_the_descent_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, x = (torch.randn((2, 3, 16, 16), generator=generator) for _ in range(2))
    stretch = torch.rand(truth.shape, generator=generator)

    def loss(x: Tensor, progress: float) -> Tensor:
        return (stretch * (x - truth).square()).sum()

    found, cosine = alignment(loss, x, truth)  # type: ignore[arg-type]
    away = x - truth
    slow = [
        float((stretch * a * a).sum() / ((stretch * a).norm() * a.norm()))
        for stretch, a in zip(stretch, away, strict=True)
    ]
    assert found == pytest.approx(float((stretch * away * away).sum()), rel=1e-5)
    assert cosine == pytest.approx(sum(slow) / 2, rel=1e-5) and 0.8 < cosine < 1
    assert alignment(lambda x, _: -loss(x, 0), x, truth)[1] == pytest.approx(-cosine)  # type: ignore[arg-type]
    elsewhere = torch.randn(truth.shape, generator=generator)
    lost = alignment(lambda x, _: (x * elsewhere).sum(), x, truth)[1]  # type: ignore[arg-type]
    assert abs(lost) < 4 * truth[0].numel() ** -0.5


def test_the_benchmark_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sgd = LocalTraining("sgd", lr=0.01, local_steps=2, batch_size=1)
    case = Case(sgd, AttackConfig())
    monkeypatch.setitem(BENCHMARKS, "alignment", replace(SUITE, cases=(case,)))
    out = tmp_path / "alignment.json"
    command = ["bench", "alignment", "--dataset", "photos", "--out", str(out)]
    flowleak(*command, "--trials", "2")
    rows = json.loads(out.read_text())["rows"]
    assert {(row["start"], row["seed"]) for row in rows} == {
        (start, seed) for start in (START, *NOISES) for seed in (0, 1)
    }
    losses = {row["start"]: row["loss"] for row in rows if row["seed"] == 0}
    assert 0 < losses["32 dB"] < losses["20 dB"] < losses[START]
    # Two convolutions and two linear layers: the descent is far from chance.
    assert all(row["alignment"] > 5 * row["chance"] for row in rows if row["start"] in NOISES)
    table = out.with_suffix(".md")
    assert "| sgd 0.01 K=2 B=1 | 2 | 0." in table.read_text()
    table.unlink()
    flowleak(*command, "--trials", "2")  # the rows are kept
    assert json.loads(out.read_text())["rows"] == rows
    assert "| sgd 0.01 K=2 B=1 | 2 | 0." in table.read_text()


def test_its_clients_are_every_architecture_with_each_norm() -> None:
    names = [case.client.split(" sgd ")[0] for case in SUITE.cases]
    assert len(set(names)) == len(names) == 12
    assert {"vit_tiny", "resnet18 BatchNorm eval", "vgg11 group norm"} <= set(names)

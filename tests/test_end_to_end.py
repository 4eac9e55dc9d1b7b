"""The user's command, in a Flower home and on ports of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flower_home import PROJECT, FlowerHome, flower_home

from fl_app.runs.described import load_client
from flowleak import Budget, attack_update
from server_strategies.observations import ObservationStore


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerHome]:
    """Yield the Flower home of all runs here."""
    with flower_home(tmp_path_factory.mktemp("flwr")) as home:
        yield home


def _run(home: FlowerHome, overrides: str) -> tuple[str, str]:
    return home.audit(f'attack="sme" overrides="{overrides}"')


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_audit_leaves_a_whole_run_and_a_clean_project(home: FlowerHome, tmp_path: Path) -> None:
    pyproject = (PROJECT / "pyproject.toml").read_bytes()
    status, log = _run(
        home, f"attack.iterations=3 rounds=2 runs_dir={tmp_path} name=tiny watch.clients=[0,3]"
    )
    assert status == "finished:completed", log
    run = tmp_path / "tiny"
    lines = _lines(run / "leakage.jsonl")
    assert sorted(line["client"] for line in lines) == [0, 3]
    assert {(line["status"], line["round"], line["iterations"]) for line in lines} == {("ok", 1, 3)}
    assert all((run / line["picture"]).is_file() for line in lines)
    assert len(list((run / "truth").glob("round-0001-*"))) == 4
    assert len(list((run / "truth").iterdir())) == 4  # none of round 2, which is not watched
    assert len(list((run / "observations").glob("round-*"))) == 2
    assert list((run / "queue").iterdir()) == []
    assert json.loads((run / "training.json").read_text())[0]["round"] == 1
    models = sorted(file.name for file in (run / "models").iterdir())
    assert models == ["round-0001.safetensors", "round-0002.safetensors"]
    assert str(run / "leakage.jsonl") in log and f"Report: {run / 'report.html'}" in log
    assert "could identify" in (run / "report.html").read_text()
    assert (PROJECT / "pyproject.toml").read_bytes() == pyproject


def test_bad_value_is_refused_before_anything_starts(home: FlowerHome, tmp_path: Path) -> None:
    status, log = _run(home, f"client.lr=-1 runs_dir={tmp_path}/runs")
    assert status == "finished:failed"
    assert "client.lr is -1" in log
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_refused_before_anything_starts(home: FlowerHome, tmp_path: Path) -> None:
    missing = tmp_path / "no_such_folder"
    status, log = _run(
        home,
        f"dataset.name=cifar10 dataset.source={missing} rounds=1 runs_dir={tmp_path} name=none",
    )
    assert status == "finished:failed"
    assert f"{missing} is not a folder" in log
    assert not (tmp_path / "none").exists()


def test_a_users_own_federation_is_recorded_attacked_and_scored(tmp_path: Path) -> None:
    app, truth = tmp_path / "app", tmp_path / "truth"
    shutil.copytree(PROJECT / "examples" / "quickstart", app)
    truth.mkdir()
    with flower_home(tmp_path / "home", app=app) as home:
        status, log = home.audit(f'truth-dir="{truth}" batch-size=1')
    assert status == "finished:completed", log
    run = app / "leaks" / "watched"
    assert f"flowleak attack {run}" in log
    assert len(list((run / "observations").glob("round-*"))) == 2
    node = next(truth.iterdir())
    held = torch.load(node, weights_only=True)
    id_ = f"round-0001-{node.stem}"
    seen = ObservationStore(run).load(id_)
    assert seen.num_examples == 5
    # What the strategy recorded is the user's own model, trained as audit.py describes it.
    described = load_client(app / "audit.py")
    private = (held["images"], held["labels"].tolist())
    budget = Budget(iterations=20)
    verdict = attack_update(described, seen.w0, seen.w1, 5, budget=budget, truth=private)
    assert sorted(verdict.found.labels) == sorted(held["labels"].tolist())
    assert verdict.leakage is not None and not verdict.found.diagnosis

"""The commands a user types: benchmarks that resume, runs that are shown and attacked again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from client_app.training import train
from fl_app import bench_cases
from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import read_lines
from fl_app.audit.runs import create_run
from fl_app.audit.truth import write_truth
from fl_app.bench import Case, draw_client
from fl_app.cli import app
from fl_app.config import AttackConfig, load_config
from fl_app.data import dataset_info, load_split
from fl_app.models import create_model
from fl_app.protocol import LocalTraining
from server_strategies.attack_pool import pending
from server_strategies.observations import ObservationStore

CASE = Case(
    LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=2), AttackConfig("sme", 2), bar=99.0
)


def flowleak(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_draw_is_a_real_clients_training() -> None:
    config = load_config().dataset
    info, images = dataset_info(config), load_split(config, "test")
    observation, knowledge, truth = draw_client(CASE, images, info, seed=4)
    again = draw_client(CASE, images, info, seed=4)[0]
    assert all(torch.equal(observation.w1[name], again.w1[name]) for name in again.w1)
    model = create_model("convnet", info.num_classes, info.image_shape, seed=4)
    labels, batches = torch.tensor(truth.labels), [torch.tensor(b) for b in truth.batches]
    assert all(torch.equal(observation.w0[k], v) for k, v in model.state_dict().items())
    train(model, truth.images, labels, batches, CASE.training, info.mean, info.std)
    assert all(torch.equal(observation.w1[k], v) for k, v in model.state_dict().items())
    assert knowledge.labels == truth.labels
    with pytest.raises(ValueError, match="needs 2000 images"):
        draw_client(
            Case(LocalTraining(batch_size=1000, local_steps=2), CASE.attack), images, info, 0
        )


def test_benchmark_resumes_and_fails_below_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_cases.BENCHMARKS, "quick", (CASE,))
    out = tmp_path / "quick.json"
    command = ["bench", "quick", "--dataset", "photos", "--out", str(out)]
    assert "sgd 0.01 K=2 B=2" in flowleak(*command, "--draws", "1")
    first = json.loads(out.read_text())
    shown = flowleak(*command, "--draws", "2")
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == first["rows"][0]  # kept, not made again
    assert [row["seed"] for row in rows] == [0, 1]
    assert "the bar is 99 dB" in shown
    means = [row["metrics"]["psnr"]["mean"] for row in rows]
    summary = json.loads(out.read_text())["summary"][0]["psnr"]
    assert summary["mean"] == pytest.approx(sum(means) / 2)
    assert summary["low"] < summary["mean"] < summary["high"]
    failed = CliRunner().invoke(app, [*command, "--draws", "2", "--bars"])
    assert failed.exit_code == 1
    with pytest.raises(ValueError, match="choose another --out"):
        flowleak(*command, "--split", "train")
    with pytest.raises(ValueError, match="allowed: quick"):
        flowleak("bench", "nonsense")


def test_a_run_is_listed_shown_and_attacked_again(tmp_path: Path) -> None:
    settings = "client.batch_size=2 client.local_steps=2 client.lr=0.01"
    config = load_config({"client": "sgd", "overrides": f"{settings} runs_dir={tmp_path} name=x"})
    info = dataset_info(config.dataset)
    case = Case(config.client, config.attack)
    observation, _, truth = draw_client(case, load_split(config.dataset, "test"), info, seed=0)
    run = create_run(config)
    ObservationStore(run).save(observation)
    write_truth(run, truth)
    runs_dir = ["--runs-dir", str(tmp_path)]

    assert "Nothing to do" in flowleak("attack", "x", *runs_dir)
    shown = flowleak("attack", "x", "--attack", "sme", "--set", "iterations=2", *runs_dir)
    assert "sme" in shown
    lines = read_lines(run / "leakage.jsonl")[0]
    assert [(line["status"], line["iterations"]) for line in lines] == [("ok", 2)]
    assert pending(run) == []
    assert str(run / lines[0]["picture"]) in flowleak("show", "x", *runs_dir)
    assert "photos" in flowleak("runs", *runs_dir)
    assert len(Auditor(run, config, config.knowledge(info)).lines()) == 1

    with pytest.raises(ValueError, match=r"options.speed .* allowed for sme"):
        flowleak("attack", "x", "--attack", "sme", "--set", "options.speed=2", *runs_dir)
    with pytest.raises(FileNotFoundError, match="no run 'y'"):
        flowleak("show", "y", *runs_dir)


def test_prior_training_from_the_command_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), "uint8"))
    out = tmp_path / "own.safetensors"
    flowleak(
        "prior", "train", str(tmp_path / "a.npy"), "--images", "8", "--batch-size", "4",
        "--folder", str(tmp_path / "c"), "--out", str(out),
    )  # fmt: skip
    assert out.is_file()
    assert "images seen: 8" in out.with_suffix(".md").read_text()

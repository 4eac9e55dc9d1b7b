"""The commands a user types: benchmarks that resume, runs that are shown and attacked again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import flowleak
from typer.testing import CliRunner

from client_app.training import choose_batches, in_training_order, train
from fl_app.benchmarks import cases as bench_cases
from fl_app.benchmarks.benchmark import Benchmark
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.commands.main import app
from fl_app.config import AttackConfig, load_config
from fl_app.data import ImageSet, dataset_info, load_split
from fl_app.models import create_model
from fl_app.protocol import LocalTraining
from server_strategies.attacks.run import create_attack

CASE = Case(
    LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=2), AttackConfig("sme", 2), bar=99.0
)


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


def test_a_draw_after_earlier_rounds_is_federated_averaging() -> None:
    config = load_config().dataset
    info, images = dataset_info(config), load_split(config, "test")
    case = replace(CASE, model="resnet8", rounds=2)
    assert case.client == "resnet8 BatchNorm train sgd 0.01 K=2 B=2 after 2 rounds"
    observation, knowledge, truth = draw_client(case, images, info, 4, images)
    assert observation.round == truth.round == 3 and knowledge.norm == ""
    # By hand: four clients a round, and the mean of what they return.
    model = create_model("resnet8", info.num_classes, info.image_shape, seed=4)
    generator = torch.Generator().manual_seed(4)
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    for _ in range(2):
        total = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in weights.items()}
        for _ in range(4):
            model.load_state_dict(weights)
            picks = torch.randperm(len(images), generator=generator)[:4]
            _, batches = in_training_order(choose_batches(4, case.training, generator))
            private, labels = images.images[picks].float() / 255, images.labels[picks]
            steps = [torch.tensor(batch) for batch in batches]
            train(model, private, labels, steps, case.training, info.mean, info.std)
            for name, w in model.state_dict().items():
                total[name] += w.double() / 4
        weights = {n: t.to(weights[n].dtype) for n, t in total.items()}
    for name, w in observation.w0.items():
        torch.testing.assert_close(w, weights[name])
    assert observation.w0["body.1.num_batches_tracked"] == 4  # two rounds of two steps
    reason = "rounds of training before the attack need training images"
    with pytest.raises(ValueError, match=reason):
        draw_client(case, images, info, 4)
    with pytest.raises(ValueError, match="needs 4 images, the split holds 3"):
        few = ImageSet(images.images[:3], images.labels[:3])
        draw_client(replace(case, rounds=0), few, info, 4)


def test_a_bar_above_grey() -> None:
    case = replace(CASE, bar=None, above_mean_colour=3.0)
    config = load_config().dataset
    benchmark = Benchmark("known", (case,), dataset_info(config), load_split(config, "test"), {})
    benchmark.rows = [row(case, 0, 14.0, 0.5)]  # of 12 for grey
    assert benchmark.shortfalls() == [f"{case.name}: +2.00 dB above grey, the bar is +3 dB"]
    assert "| grey +3 |" in benchmark.markdown("command")
    benchmark.rows = [row(case, 0, 15.5, 0.5)]
    assert benchmark.shortfalls() == []


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
    # No draw is made, the table is; of rows of another version it says so.
    kept = json.loads(out.read_text())
    kept["rows"][0]["commit"] = "older"
    out.write_text(json.dumps(kept))
    out.with_suffix(".md").unlink()
    assert "sgd 0.01 K=2 B=2" in flowleak(*command, "--draws", "0")
    table = out.with_suffix(".md").read_text()
    assert "--draws 2 " in table and "commit older (1 of 2 rows), " in table
    # Gone on with, each row keeps the version that made it.
    flowleak(*command, "--draws", "3")
    made = [row["commit"] for row in json.loads(out.read_text())["rows"]]
    assert made[0] == "older" and made[1] == made[2] != "older"
    with pytest.raises(ValueError, match="draws is 0; allowed: 1 or more, or 0 where --out"):
        flowleak("bench", "quick", "--dataset", "photos", "--draws", "0")
    with pytest.raises(ValueError, match="allowed: quick"):
        flowleak("bench", "nonsense")


def row(case: Case, seed: int, psnr: float, lpips: float) -> dict[str, Any]:
    """A row of a benchmark whose scores are known."""
    scores = {"psnr": psnr, "lpips_vgg": lpips, "ssim": 0.5}
    means = ("loss", "loss_at_truth", "seconds", "iterations_per_second", "peak_memory")
    return {
        "case": case.name,
        "seed": seed,
        "metrics": {name: {"mean": value, "baseline": 12.0} for name, value in scores.items()},
        "psnr_by_step": [psnr],
        **dict.fromkeys((*means, "gflop_per_iteration"), 1.0),
    }


def test_cases_of_one_client_are_compared_draw_by_draw() -> None:
    first, second = CASE, replace(CASE, attack=AttackConfig("sme", 2, options={"tv": 1}), gain=2.5)
    longer = replace(CASE, attack=AttackConfig("sme", 3))
    config = load_config().dataset
    benchmark = Benchmark(
        "known", (first, second, longer), dataset_info(config), load_split(config, "test"), {}
    )
    benchmark.rows = [
        row(first, 0, 10.0, 0.5), row(first, 1, 20.0, 0.5), row(first, 2, 90.0, 0.5),
        row(second, 1, 23.0, 0.4), row(second, 0, 11.0, 0.5), row(longer, 0, 30.0, 0.1),
    ]  # fmt: skip
    gain = benchmark.summary(second)["gain"]
    # Differences 1 and 3 on the draws that both have: 2 -+ t(0.975, 1) sqrt(2) / sqrt(2).
    assert [gain["psnr"][key] for key in ("mean", "low", "high")] == pytest.approx(
        [2, 2 - 12.706, 2 + 12.706], abs=1e-3
    )
    assert gain["lpips_vgg"]["mean"] == pytest.approx(-0.05)
    assert "gain" not in benchmark.summary(first)
    assert "gain" not in benchmark.summary(longer)  # other iterations
    assert "| +2.00 ± 12.71 | -0.050 ± 0.635 |" in benchmark.markdown("command")
    short = [words for words in benchmark.shortfalls() if words.startswith(second.name)]
    assert [words.split(": ")[1] for words in short if "99" not in words] == [
        "+2.00 ± 12.71, the bar is +2.5 dB"
    ]
    benchmark.rows[3]["metrics"]["lpips_vgg"] = benchmark.rows[4]["metrics"]["lpips_vgg"] = None
    assert any("LPIPS VGG not measured" in words for words in benchmark.shortfalls())


def test_who_has_to_be_first_and_above_grey() -> None:
    leader = replace(CASE, attack=AttackConfig("flow_matching", 9, 2.5), bar=None, first=True)
    rival = replace(CASE, attack=AttackConfig("sme", 9, 2.5), bar=None, above_mean_colour=3.0)
    elsewhere = replace(CASE, attack=AttackConfig("sme", 9), bar=None)
    assert rival.name.endswith(", sme 2.5 s") and elsewhere.name.endswith(", sme x9")
    config = load_config().dataset
    cases = (leader, rival, elsewhere)
    benchmark = Benchmark(
        "known", cases, dataset_info(config), load_split(config, "test"), {}
    )  # fmt: skip
    benchmark.rows = [
        row(leader, 0, 14.0, 0.5), row(rival, 0, 14.5, 0.5), row(elsewhere, 0, 30.0, 0.5)
    ]  # fmt: skip
    assert benchmark.shortfalls() == [
        f"{leader.name}: 14.00 dB, but 14.50 dB by sme",
        f"{rival.name}: +2.50 dB above grey, the bar is +3 dB",
    ]
    assert benchmark.reference(rival) == leader and benchmark.reference(elsewhere) is None
    benchmark.rows[1]["metrics"]["psnr"]["mean"] = 13.5
    benchmark.rows[1]["metrics"]["psnr"]["baseline"] = 10.0
    assert benchmark.shortfalls() == []
    assert "| first |" in benchmark.markdown("c") and "| grey +3 |" in benchmark.markdown("c")


def test_a_part_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CASE, attack=AttackConfig("sme", 1, options={"tv": 0.5}))
    monkeypatch.setitem(bench_cases.BENCHMARKS, "prior", (CASE, other))
    out = tmp_path / "prior.json"
    command = ["bench", "prior", "--dataset", "photos", "--out", str(out), "--draws", "1"]
    flowleak(*command, "--cases", "^sgd.*tv=0.5 x")
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == [other.name]
    table = out.with_suffix(".md").read_text()
    assert "--cases '^sgd.*tv=0.5 x'`" in table
    assert "(sgd, B=2; at most 0.5 was asked for)" in table
    with pytest.raises(ValueError, match=r"no case of prior .* like 'sgd 0\.01 K=2 B=2, sme x2'"):
        flowleak(*command, "--cases", "tv=7")
    with pytest.raises(ValueError, match=r"cases is '\(': no regular expression, missing \)"):
        flowleak(*command, "--cases", "(")
    with pytest.raises(ValueError, match="labels has none"):
        flowleak("bench", "labels", "--cases", "sgd")


def test_every_benchmark_can_run() -> None:
    config = load_config().dataset
    info, images = dataset_info(config), load_split(config, "test")
    for name, cases in bench_cases.BENCHMARKS.items():
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            create_attack(case.attack)
            assert case.gain is None or Benchmark(name, cases, info, images, {}).reference(case)

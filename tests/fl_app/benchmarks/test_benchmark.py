"""The commands a user types: benchmarks that resume, runs that are shown and attacked again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import flowleak
from rich.console import Console
from typer.testing import CliRunner

from client_app.training import train
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.suite import AttackSuite, Setting
from fl_app.commands.main import app
from fl_app.config import AttackConfig, load_config
from fl_app.data import ImageSet, dataset_info, load_split
from fl_app.models import create_model
from fl_app.protocol import LocalTraining
from fl_app.registry import BENCHMARKS
from server_strategies.attacks.run import create_attack

CASE = Case(
    LocalTraining("sgd", lr=0.01, batch_size=2, local_steps=2),
    AttackConfig("sme", 2),
    threshold=99.0,
)


def test_a_trial_is_a_real_clients_training() -> None:
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


def test_an_attack_that_matches_no_update_has_a_row_too() -> None:
    setting = Setting(load_config().dataset)
    attack = AttackConfig("feature_regression", 1, options={"images": 60})
    training = LocalTraining("sgd", lr=0.01, batch_size=1, local_steps=1)
    case = Case(training, attack, model="resnet8")
    (row,) = AttackSuite((case,)).trial(case, 0, setting.clients((case,)), setting)
    assert row["loss_at_truth"] is None and row["metrics"]["psnr"]["mean"] > 0
    results = AttackResults("known", (case,))
    results.rows = [row]
    assert case.client in results.markdown("command")


def test_another_tools_images_are_scored_in_the_same_table(tmp_path: Path) -> None:
    suite, updates = AttackSuite((CASE,)), tmp_path / "updates"
    setting = Setting(load_config().dataset, trials=1, path=tmp_path / "rows.json", updates=updates)
    suite.run("known", setting, Console(file=io.StringIO()))
    (folder,) = updates.iterdir()
    told = json.loads((folder / "client.json").read_text())
    assert told["examples"] == 4 and told["labels"] == sorted(told["labels"])
    before = torch.load(folder / "before.pt", weights_only=True)
    images = setting.clients((CASE,)).draw(CASE, 0)[2].images
    assert set(before) == set(torch.load(folder / "after.pt", weights_only=True))
    np.savez(folder / "other@30.npz", images=images.flip(0).numpy())
    results = suite.run("known", setting, Console(file=io.StringIO()))
    ours, theirs = results.rows
    assert theirs["metrics"]["ssim"]["mean"] > 0.99 > ours["metrics"]["ssim"]["mean"]
    assert "| other 30 s |" in results.markdown("command")
    np.savez(folder / "few@30.npz", images=images[:2].numpy())
    with pytest.raises(ValueError, match="needed: 4 of them"):
        suite.run("known", setting, Console(file=io.StringIO()))


def test_a_client_of_more_images_than_there_are_is_refused() -> None:
    config = load_config().dataset
    images = load_split(config, "test")
    few = ImageSet(images.images[:3], images.labels[:3])
    with pytest.raises(ValueError, match="needs 4 images, the split holds 3"):
        draw_client(CASE, few, dataset_info(config), 4)


def test_a_threshold_above_the_mean_colour() -> None:
    case = replace(CASE, threshold=None, above_mean_colour=3.0)
    benchmark = AttackResults("known", (case,))
    benchmark.rows = [row(case, 0, 14.0, 0.5)]  # of 12 for the mean colour
    missed = "+2.00 dB above the mean colour, the threshold is +3 dB"
    assert benchmark.shortfalls() == [f"{case.name}: {missed}"]
    assert "| mean colour +3 |" in benchmark.markdown("command")
    benchmark.rows = [row(case, 0, 15.5, 0.5)]
    assert benchmark.shortfalls() == []


def test_what_knowing_less_may_cost_and_how_many_are_to_be_identified() -> None:
    by_step, counts = (
        replace(CASE, threshold=None, labels="by-step"),
        replace(CASE, threshold=None, labels="counts", within=1.0, identified=0.9),
    )
    assert "labels by-step, sme x2" in by_step.name and "labels counts, sme x2" in counts.name
    benchmark = AttackResults("known", (by_step, counts))
    assert benchmark.reference(counts) == by_step  # the same client, and the same trials

    def shortfalls(psnr: float, *identified: bool) -> list[str]:
        found = {"identified": identified, "rank": (1, 1), "candidates": (9, 9), "by": "pixels"}
        benchmark.rows = [row(by_step, 0, 25.0, 0.5), row(counts, 0, psnr, 0.5)]
        benchmark.rows[1]["identification"] = found
        return benchmark.shortfalls()

    assert shortfalls(24.1, True, True) == []
    assert shortfalls(23.5, True, False) == [
        f"{counts.name}: 1 of 2 identified, the threshold is 90%",
        f"{counts.name}: -1.50 dB to its first, the threshold is -1 dB",
    ]
    assert "| 90% identified; first -1 dB |" in benchmark.markdown("command")


def test_benchmark_resumes_and_fails_below_its_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BENCHMARKS, "quick", AttackSuite((CASE,)))
    out = tmp_path / "quick.json"
    command = ["bench", "quick", "--dataset", "photos", "--out", str(out)]
    assert "sgd 0.01 K=2 B=2" in flowleak(*command, "--trials", "1")
    first = json.loads(out.read_text())
    shown = flowleak(*command, "--trials", "2")
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == first["rows"][0]  # kept, not made again
    assert [row["seed"] for row in rows] == [0, 1]
    assert "the threshold is 99 dB" in shown
    means = [row["metrics"]["psnr"]["mean"] for row in rows]
    summary = json.loads(out.read_text())["summary"][0]["psnr"]
    assert summary["mean"] == pytest.approx(sum(means) / 2)
    assert summary["low"] is summary["high"] is None and summary["values"] == means
    failed = CliRunner().invoke(app, [*command, "--trials", "2", "--check"])
    assert failed.exit_code == 1
    with pytest.raises(ValueError, match="choose another --out"):
        flowleak(*command, "--split", "train")
    # No trial is made, the table is; of rows of another version and machine it says so.
    kept = json.loads(out.read_text())
    kept["machine"]["processor"] = "another"
    kept["rows"][0]["commit"] = "older"
    out.write_text(json.dumps(kept))
    out.with_suffix(".md").unlink()
    assert "sgd 0.01 K=2 B=2" in flowleak(*command, "--trials", "0")
    table = out.with_suffix(".md").read_text()
    assert "--trials 2 " in table and "commit older (1 of 2 rows), " in table
    assert "processor another, " in table
    # Continued, each row keeps the version that made it.
    flowleak(*command, "--trials", "3")
    made = [row["commit"] for row in json.loads(out.read_text())["rows"]]
    assert made[0] == "older" and made[1] == made[2] != "older"
    with pytest.raises(ValueError, match="trials is 0; allowed: 1 or more, or 0 where --out"):
        flowleak("bench", "quick", "--dataset", "photos", "--trials", "0")
    with pytest.raises(ValueError, match="benchmark is 'nonsense'; allowed: alignment, "):
        flowleak("bench", "nonsense")


def row(case: Case, seed: int, psnr: float, lpips: float) -> dict[str, Any]:
    """A row of a benchmark whose scores are known."""
    scores = {"psnr": psnr, "lpips_vgg": lpips, "ssim": 0.5}
    means = ("loss", "loss_at_truth", "seconds", "iterations_per_second", "peak_memory")
    return {
        "case": case.name,
        "seed": seed,
        "metrics": {
            name: {"values": [value], "mean": value, "baseline": 12.0}
            for name, value in scores.items()
        },
        "psnr_by_step": [psnr],
        **dict.fromkeys((*means, "gflop_per_iteration"), 1.0),
    }


def test_cases_of_one_client_are_compared_trial_by_trial() -> None:
    first, second = CASE, replace(CASE, attack=AttackConfig("sme", 2, options={"tv": 1}), gain=2.5)
    longer = replace(CASE, attack=AttackConfig("sme", 3))
    benchmark = AttackResults("known", (first, second, longer))
    benchmark.rows = [
        row(first, 0, 10.0, 0.5), row(first, 1, 20.0, 0.5), row(first, 2, 90.0, 0.5),
        row(second, 1, 23.0, 0.4), row(second, 0, 11.0, 0.5), row(longer, 0, 30.0, 0.1),
    ]  # fmt: skip
    gain = benchmark.summary(second)["gain"]
    # Differences 1 and 3 on the trials that both have: too few for an interval.
    assert gain["psnr"] == {"mean": 2, "low": None, "high": None, "values": [3, 1]}
    assert gain["lpips_vgg"]["mean"] == pytest.approx(-0.05)
    assert "gain" not in benchmark.summary(first)
    assert "gain" not in benchmark.summary(longer)  # other iterations
    assert "| +2.00 (+3.00, +1.00) | -0.050 (-0.100, +0.000) |" in benchmark.markdown("command")
    short = [words for words in benchmark.shortfalls() if words.startswith(second.name)]
    assert [words.split(": ")[1] for words in short if "99" not in words] == [
        "+2.00 (+3.00, +1.00), the threshold is +2.5 dB"
    ]
    benchmark.rows[3]["metrics"]["lpips_vgg"] = benchmark.rows[4]["metrics"]["lpips_vgg"] = None
    assert any("LPIPS VGG not measured" in words for words in benchmark.shortfalls())


def test_who_has_to_be_first_and_above_the_mean_colour() -> None:
    leader = replace(CASE, attack=AttackConfig("flow_matching", 9, 2.5), threshold=None, first=True)
    rival = replace(CASE, attack=AttackConfig("sme", 9, 2.5), threshold=None, above_mean_colour=3.0)
    elsewhere = replace(CASE, attack=AttackConfig("sme", 9), threshold=None)
    assert rival.name.endswith(", sme 2.5 s") and elsewhere.name.endswith(", sme x9")
    benchmark = AttackResults("known", (leader, rival, elsewhere))
    benchmark.rows = [
        row(leader, 0, 14.0, 0.5), row(rival, 0, 14.5, 0.5), row(elsewhere, 0, 30.0, 0.5)
    ]  # fmt: skip
    assert benchmark.shortfalls() == [
        f"{leader.name}: 14.00 dB, but 14.50 dB by sme",
        f"{rival.name}: +2.50 dB above the mean colour, the threshold is +3 dB",
    ]
    assert benchmark.reference(rival) == leader and benchmark.reference(elsewhere) is None
    benchmark.rows[1]["metrics"]["psnr"]["mean"] = 13.5
    benchmark.rows[1]["metrics"]["psnr"]["baseline"] = 10.0
    assert benchmark.shortfalls() == []
    table = benchmark.markdown("c")
    assert "| first |" in table and "| mean colour +3 |" in table


def test_a_part_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CASE, attack=AttackConfig("sme", 1, options={"tv": 0.5}))
    suite = replace(BENCHMARKS["prior"], cases=(CASE, other))
    monkeypatch.setitem(BENCHMARKS, "prior", suite)
    out = tmp_path / "prior.json"
    command = ["bench", "prior", "--dataset", "photos", "--out", str(out), "--trials", "1"]
    flowleak(*command, "--cases", "^sgd.*tv=0.5 x")
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == [other.name]
    table = out.with_suffix(".md").read_text()
    assert "--cases '^sgd.*tv=0.5 x'`" in table
    assert "(sgd, B=2; at most 0.5 was asked for)" in table
    with pytest.raises(ValueError, match=r"no case of prior .* like 'sgd 0\.01 K=2 B=2, labels c"):
        flowleak(*command, "--cases", "tv=7")
    with pytest.raises(ValueError, match=r"cases is '\(': no regular expression, missing \)"):
        flowleak(*command, "--cases", "(")
    notes = table.splitlines()[-4:-2]
    flowleak(*command[:-1], "0")  # what the prior costs is not measured again
    assert out.with_suffix(".md").read_text().splitlines()[-4:-2] == notes


def test_every_benchmark_can_run() -> None:
    for name, suite in BENCHMARKS.items():
        assert BENCHMARKS.entries[name].docstring().splitlines()[0].endswith(".")
        assert len({case.name for case in suite.cases}) == len(suite.cases)
        for case in suite.cases:
            create_attack(case.attack)
            assert case.gain is None or AttackResults(name, suite.cases).reference(case)

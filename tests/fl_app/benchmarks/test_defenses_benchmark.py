"""What a defence costs and buys: federations in a loop, and the benchmark's table and plot."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from helpers.command import flowleak
from helpers.federation import LocalGrid, real_client
from PIL import Image

from fl_app.benchmarks import accuracy
from fl_app.benchmarks.accuracy import federated_accuracy
from fl_app.benchmarks.attack_results import AttackResults
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.benchmarks.defense_plot import kind, parameter
from fl_app.benchmarks.defense_table import compare_with_sme
from fl_app.benchmarks.federation import Federation, _sampled
from fl_app.config import AttackConfig, load_config
from fl_app.data import ImageSet, dataset_info, load_partition, load_split
from fl_app.models import create_model
from fl_app.protocol import Defense, LocalTraining
from fl_app.registry import BENCHMARKS

SGD = LocalTraining("sgd", lr=0.05, batch_size=4, local_steps=2)
NOISY = Defense(noise="gaussian", sigma=0.01)


def test_the_loop_is_a_federation_of_real_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own FedAvg over real clients ends with the weights that the loop evaluates."""
    random.seed(0)
    overrides = "client.lr=0.05 client.batch_size=4 client.local_steps=2 num_clients=3 "
    overrides += "client.optimizer=sgd defense.noise=gaussian defense.sigma=0.01"
    config = load_config({"overrides": overrides})
    info = dataset_info(config.dataset)
    parts = [load_partition(config.dataset, client, 3, 0) for client in range(3)]
    model = create_model("convnet", info.num_classes, info.image_shape, 0)
    grid = LocalGrid([real_client(client, overrides) for client in range(3)])
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    expected = result.arrays.to_torch_state_dict()

    ended: list[dict[str, torch.Tensor]] = []

    def remember(model: torch.nn.Module, *_: object) -> tuple[float, float]:
        ended.append(model.state_dict())
        return 0.0, 0.5

    monkeypatch.setattr("fl_app.benchmarks.accuracy.evaluate", remember)
    # Laid so that the loop's seeded shuffle deals every client its own partition.
    picks = torch.randperm(sum(map(len, parts)), generator=torch.Generator().manual_seed(0))
    images = torch.empty((len(picks), *info.image_shape), dtype=torch.uint8)
    labels = torch.empty(len(picks), dtype=torch.int64)
    for client, part in enumerate(parts):
        images[picks[client::3]], labels[picks[client::3]] = part.images, part.labels
    federation = Federation(SGD, NOISY, clients=3, rounds=2)
    assert federated_accuracy(federation, ImageSet(images, labels), parts[0], info, 0) == 0.5
    for name, value in ended[0].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_some_clients_train_in_a_round_the_same_with_a_defence() -> None:
    plain = Federation(SGD, clients=5, sampled=2)
    rounds = [_sampled(plain, 0, round_) for round_ in range(1, 20)]
    assert {len(set(chosen)) for chosen in rounds} == {2}
    assert set().union(*rounds) == set(range(5))
    assert [_sampled(replace(plain, defense=NOISY), 0, r) for r in range(1, 20)] == rounds
    assert "2 a round" in plain.name and _sampled(replace(plain, sampled=0), 0, 1) == [*range(5)]


def test_a_defence_that_destroys_the_update_costs_accuracy() -> None:
    bright = torch.arange(40) % 2
    images = (bright.view(-1, 1, 1, 1) * 200 + 20).expand(-1, 3, 8, 8).to(torch.uint8)
    data = ImageSet(images, bright)
    info = replace(dataset_info(load_config().dataset), num_classes=2, image_shape=(3, 8, 8))
    fair = Federation(replace(SGD, local_steps=10), clients=2, rounds=3)
    assert federated_accuracy(fair, data, data, info, 0) == 1.0
    drowned = replace(fair, defense=Defense(noise="gaussian", sigma=10.0))
    assert federated_accuracy(drowned, data, data, info, 0) < 1.0
    assert fair.name != drowned.name


def test_the_benchmark_knows_or_hides_the_defence_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(SGD, batch_size=1)
    plain = Case(training, AttackConfig("sme", 2))
    cases = (
        plain,
        replace(plain, defense=NOISY),
        replace(plain, defense=NOISY, defense_known=False),
        replace(plain, attack=AttackConfig("flow_matching", 2), defense=NOISY),
    )
    monkeypatch.setitem(BENCHMARKS, "defenses", replace(BENCHMARKS["defenses"], cases=cases))
    monkeypatch.setattr(
        accuracy,
        "federation_of",
        lambda case: Federation(training, case.defense, clients=2, rounds=1, images=8),
    )
    out = tmp_path / "defenses.json"
    command = ["bench", "defenses", "--dataset", "photos", "--trials", "1", "--out", str(out)]
    flowleak(*command, "--cases", "noise")
    accuracies = json.loads((tmp_path / "defenses.accuracy.json").read_text())["rows"]
    measured = {row["federation"].rsplit(", ")[-1]: row["accuracy"] for row in accuracies}
    assert measured.keys() == {"none", str(NOISY)}
    flowleak(*command)
    assert json.loads((tmp_path / "defenses.accuracy.json").read_text())["rows"] == accuracies
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    changed = {row["case"]: row["distortion"] for row in rows}
    assert changed[plain.name] == 0 and changed[cases[1].name] > 0.1
    table = out.with_suffix(".md").read_text()
    line = next(words for words in table.splitlines() if "| no |" in words)
    assert f"| sgd 0.05 K=2 B=1 | counts | {NOISY} | sme x2 | no | 1 |" in line
    assert f"{measured[str(NOISY)]:.1%} |" in line
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.width > 1000
    out.with_suffix(".md").unlink()
    flowleak("bench", "defenses", "--dataset", "photos", "--trials", "0", "--out", str(out))
    assert line in out.with_suffix(".md").read_text()  # without training a federation
    with pytest.raises(ValueError, match="holds results of"):
        flowleak(*command, "--seed", "5", "--out", str(out))


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (Defense(), ("", "none")),
        (NOISY, ("gaussian", "0.01")),
        (replace(NOISY, relative=True), ("gaussian relative", "0.01")),
        (Defense(dp_clip=1.0, dp_noise=0.5), ("dp", "0.5")),
        (Defense(clip=0.1, clip_by="norm", local_dp=8.0), ("local_dp", "8")),
        (Defense(quantize="int8"), ("quantize", "int8")),
    ],
)
def test_a_curve_is_a_kind_of_defence(defense: Defense, expected: tuple[str, str]) -> None:
    assert (kind(defense), parameter(defense)) == expected


def score(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def test_above_sme_means_intervals_apart_on_the_better_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [Case(SGD, AttackConfig(name, 2), defense=NOISY) for name in ("sme", "flow_matching")]
    scores = {
        "sme": {"psnr": score(18, 1), "ssim": score(0.5, 0.1), "lpips_vgg": score(0.4, 0.05)},
        "flow_matching": {
            "psnr": score(21, 1), "ssim": score(0.6, 0.1), "lpips_vgg": score(0.2, 0.05),
        },
    }  # fmt: skip
    benchmark = AttackResults("known", cases)
    monkeypatch.setattr(benchmark, "summary", lambda c: {"trials": 8, **scores[c.attack.name]})
    (line,) = compare_with_sme(benchmark)
    assert line.endswith("intervals apart, on PSNR dB, LPIPS VGG.")
    # What both trials share is no difference between the attacks: +3 and +5 dB.
    benchmark.rows = [
        {"case": case.name, "seed": seed, "metrics": {"psnr": {"mean": psnr}}}
        for case, scores in zip(cases, ((10.0, 20.0), (13.0, 25.0)), strict=True)
        for seed, psnr in enumerate(scores)
    ]
    (line,) = compare_with_sme(benchmark)
    assert line.endswith("LPIPS VGG; trial by trial PSNR dB +4.0 (+3.0, +5.0).")


def test_an_undefended_trial_is_untouched_and_a_known_defence_is_told() -> None:
    config = load_config().dataset
    info, images = dataset_info(config), load_split(config, "test")
    case = Case(SGD, AttackConfig("sme", 2), defense=NOISY)
    observation, knowledge, _ = draw_client(case, images, info, 1)
    plain, unaware, _ = draw_client(replace(case, defense=Defense()), images, info, 1)
    assert knowledge.defense == NOISY and unaware.defense == Defense()
    noise = torch.cat([(observation.w1[n] - plain.w1[n]).flatten() for n in plain.trained])
    assert noise.std() == pytest.approx(0.01, rel=0.01)

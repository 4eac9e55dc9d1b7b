"""The comparison, of attacks that pretend, in this process instead of the pool."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.attacks import pretended
from PIL import Image
from rich.console import Console

from fl_app.audit import comparison as drawing
from fl_app.audit.auditor import Auditor
from fl_app.audit.baselines import MEAN_COLOUR, PRIOR, TRAINING, baseline_images
from fl_app.audit.comparison import NOISE, compare
from fl_app.audit.leakage_log import read_lines
from fl_app.audit.truth import read_truth, write_truth
from fl_app.benchmarks.case import Case
from fl_app.benchmarks.clients import draw_client
from fl_app.config import AttackConfig, Config, ConfigError, load_config
from fl_app.data import dataset_info, load_split
from fl_app.protocol import Knowledge, Observation, Reconstruction
from fl_app.registry import ATTACKS
from fl_app.runs import comparison
from fl_app.runs.comparison import AttackComparison, budgeted
from fl_app.runs.folder import create_run
from server_strategies.attack_pool import pending, queue_path
from server_strategies.observations import ObservationStore
from server_strategies.priors.flow import load_flow


def run_of(tmp_path: Path, clients: int = 2, settings: str = "") -> tuple[Path, Auditor]:
    """Return a run with the updates of some clients, of two images each, and its auditor."""
    overrides = f"client.batch_size=1 client.local_steps=2 runs_dir={tmp_path} {settings}"
    overrides += f" audit.lpips_weights={tmp_path}"  # there are none: LPIPS takes seconds
    config = load_config({"client": "sgd", "overrides": overrides})
    info, images = dataset_info(config.dataset), load_split(config.dataset, "train")
    folder = create_run(config)
    for seed in range(clients):
        case = Case(config.client, config.attack)
        observation, _, truth = draw_client(case, images, info, seed)
        ObservationStore(folder).save(observation)
        if config.audit.truth is not False:
            write_truth(folder, truth)
    return folder, Auditor(folder, config, config.knowledge(info))


def noise(seen: Observation, known: Knowledge, attack: AttackConfig) -> Reconstruction:
    """Return images that an attack by this name pretends to find, always the same."""
    generator = torch.Generator().manual_seed(sum(attack.name.encode()) + seen.client)
    images = torch.rand(seen.num_examples, *known.image_shape, generator=generator)
    found = pretended(replace(seen, w1={"x": images}), attack)
    labels = known.labels or (0,) * seen.num_examples
    return replace(found, labels=labels, iterations=attack.iterations)


def attack_here(auditor: Auditor, console: Console) -> int:
    """Do as `finish_attacks`, without Ray and its processes."""
    entries, store = pending(auditor.run_dir), ObservationStore(auditor.run_dir)
    for entry in entries:
        seen = store.load(entry.observation)
        try:
            found = noise(seen, auditor.grant(seen), entry.attack)
            auditor.record(seen, found, entry.id)
        except ValueError as error:
            auditor.record_failure(seen, entry.attack.name, str(error), entry.id)
        queue_path(auditor.run_dir, entry.id).unlink()
    return len(entries)


def test_every_attack_is_lined_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "finish_attacks", attack_here)
    folder, auditor = run_of(tmp_path)
    drawn: list[Mapping[str, Sequence[torch.Tensor | None]]] = []
    draw = drawing.save_grid

    def spy(path: Path, columns: Mapping[str, Any], caption: Sequence[str]) -> None:
        drawn.append(columns)
        draw(path, columns, caption)

    monkeypatch.setattr(drawing, "save_grid", spy)
    chosen = AttackComparison.of("all", "iterations=2")
    chosen.run(folder, Console(quiet=True))
    heads = [head.partition("\n") for head in drawn[0]]
    private = [image for image in drawn[0]["private"] if image is not None]
    truths = [read_truth(folder, 1, seed) for seed in range(2)]
    assert torch.equal(torch.stack(private), torch.cat([t.images for t in truths if t]))
    lines = auditor.lines()
    assert len(lines) == 2 * len(ATTACKS)
    summary = json.loads((folder / "comparison.json").read_text())
    assert set(summary["attacks"]) == set(ATTACKS)
    # The truth is in the first column, then the best attack, and what needs no update in the last.
    baselines = (MEAN_COLOUR, TRAINING, PRIOR)
    assert [name for name, *_ in heads] == ["private", *summary["attacks"], *baselines]
    found = [entry["metrics"].get("psnr") for entry in summary["attacks"].values()]
    best_first = [score["mean"] if score else -math.inf for score in found]
    assert best_first == sorted(best_first, reverse=True)
    assert heads[1][2] == f"{best_first[0]:.1f} dB"
    for entry in summary["attacks"].values():
        assert entry["succeeded"] + len(entry["failures"]) == 2

    psnr = summary["attacks"]["sme"]["metrics"]["psnr"]
    scores = [line["metrics"]["psnr"] for line in lines if line["attack"] == "sme"]
    means = [score["mean"] for score in scores]
    each = [value for score in scores for value in score["values"]]
    assert psnr["mean"] == pytest.approx(sum(means) / 2) and len(each) == 4
    assert psnr["low"] is psnr["high"] is None  # two observations have no interval
    assert psnr["worst_tenth"] == max(each)
    entry = summary["attacks"]["sme"]
    assert entry["identified"]["of"] == 4 and 0 < entry["identified"]["chance"] < 0.1
    assert psnr["chance"][MEAN_COLOUR] < entry["single_colour"]
    assert set(psnr["chance"]) == {MEAN_COLOUR, TRAINING, PRIOR}
    # The log's own baseline of every metric is the mean colour, too.
    for metric in ("psnr", "ssim", "mse", "fmse", "tv"):
        logged = [line["metrics"][metric]["baseline"] for line in lines if line["attack"] == "sme"]
        chance = summary["attacks"]["sme"]["metrics"][metric]["chance"]
        assert chance[MEAN_COLOUR] == pytest.approx(sum(logged) / 2, rel=1e-5)
    assert summary["attacks"]["sme"]["iterations"] == 2
    assert "lpips_vgg" in summary["reasons"]
    table = (folder / "comparison.md").read_text()
    assert f"| {PRIOR} |" in table and "--budget iterations=2`" in table
    assert "- Labels: counts " in table and summary["labels"] == "counts"
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > (1 + len(ATTACKS)) * 96 and picture.height > 4 * 96

    # A killed comparison: one line was not written. The same command makes it, and nothing else.
    log = folder / "leakage.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rest))
    AttackComparison.of("all", "iterations=2").run(folder, Console(quiet=True))
    made = read_lines(log)[0][len(rest) :]
    assert [line["job"] for line in made] == [json.loads(first)["job"]]
    again = json.loads((folder / "comparison.json").read_text())
    assert again["attacks"]["sme"]["metrics"]["psnr"]["values"] == pytest.approx(psnr["values"])


def test_without_truth_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "finish_attacks", attack_here)
    folder, _ = run_of(tmp_path, 1, "audit.truth=false audit.labels=unknown")
    AttackComparison.of("sme", "iterations=2").run(folder, Console(quiet=True))
    summary = json.loads((folder / "comparison.json").read_text())
    assert set(summary["baselines"]) == {NOISE}
    metrics = summary["attacks"]["sme"]["metrics"]
    assert set(metrics) == {"tv", "prior_residual"} and set(metrics["tv"]["chance"]) == {NOISE}
    assert metrics["tv"]["low"] is None  # one observation has no interval
    assert "no truth" in (folder / "comparison.md").read_text()
    assert (folder / "comparison.png").exists()


def guess(images: torch.Tensor) -> Reconstruction:
    return Reconstruction("none", images, (0, 0), (0.5,), 1, 1.0, 1, 1, "iterations", "sme")


def test_a_line_is_chosen_by_its_job_never_by_its_score(tmp_path: Path) -> None:
    folder, auditor = run_of(tmp_path)
    store = ObservationStore(folder)
    one, two = (store.load(id_) for id_ in store.ids())
    truth = read_truth(folder, one.round, one.node)
    assert truth is not None
    auditor.record(one, guess(truth.images), "a")  # a perfect line, then a poor one
    auditor.record(one, guess(torch.zeros(2, 3, 32, 32)), "a")
    auditor.record(one, guess(truth.images), "of another comparison")
    auditor.record_failure(two, "sme", "out of memory", "b")
    jobs = {"sme": {one.id: "a", two.id: "b"}, "flow_matching": {one.id: "c", two.id: "d"}}
    summary: dict[str, Any] = compare(auditor, store, jobs).summary()
    entry = summary["attacks"]["sme"]
    assert entry["succeeded"] == 1 and entry["metrics"]["psnr"]["mean"] < 20
    assert entry["failures"] == [{"observation": two.id, "error": "out of memory"}]
    # Chance is over the same observation as the attack's score.
    values = summary["baselines"][MEAN_COLOUR]["psnr"]["values"]
    assert len(values) == 2
    assert entry["metrics"]["psnr"]["chance"][MEAN_COLOUR] == values[one.id]
    assert [failure["observation"] for failure in summary["attacks"]["flow_matching"]["failures"]]


def test_baselines_hold_no_private_image() -> None:
    config = load_config()
    split = load_split(config.dataset, "train").images
    info, network = dataset_info(config.dataset), load_flow("compact")
    private = split.float() / 255
    images, reasons = baseline_images(private[:2], info.mean, config.dataset, network, (0, 1))
    again, _ = baseline_images(private[:2], info.mean, config.dataset, network, (0, 1))
    assert reasons == {} and set(images) == {MEAN_COLOUR, TRAINING, PRIOR}
    for name, drawn in images.items():
        assert drawn.shape == (2, 3, 32, 32) and 0 <= drawn.min() <= drawn.max() <= 1
        assert torch.equal(drawn, again[name])
    rows = {image.numpy().tobytes() for image in split}
    for image in (255 * images[TRAINING]).round().to(torch.uint8):
        assert image.numpy().tobytes() in rows
    images, reasons = baseline_images(private, info.mean, config.dataset, None, (0, 1))
    assert "images beside the client's own" in reasons[TRAINING] and PRIOR in reasons


def test_budgets() -> None:
    attack = AttackConfig("sme", 1000)
    assert budgeted(attack, "authors") == attack
    assert budgeted(replace(attack, seconds=5), "iterations=7") == AttackConfig("sme", 7)
    assert budgeted(attack, "seconds=1.5") == AttackConfig("sme", 1_000_000, 1.5)
    for wrong in ("iterations=0", "iterations=x", "seconds=0", "seconds=inf", "minutes=1", ""):
        with pytest.raises(ConfigError, match="allowed: authors, iterations=N"):
            budgeted(attack, wrong)
    with pytest.raises(ConfigError, match="each attack once"):
        AttackComparison.of("sme,sme", "authors")
    with pytest.raises(ConfigError, match="attack is 'magic'"):
        AttackComparison.of("sme,magic", "authors")
    assert AttackComparison.of("all", "authors").attacks == tuple(
        load_config({"attack": name}).attack for name in ATTACKS
    )


def test_a_run_without_observations_is_refused(tmp_path: Path) -> None:
    folder = create_run(Config(runs_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="holds no observation"):
        AttackComparison.of("sme", "authors").run(folder, Console(quiet=True))

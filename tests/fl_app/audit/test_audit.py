from __future__ import annotations

import json
import math
import os
import re
import resource
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from helpers.audit import (
    MEAN,
    SHAPE,
    images,
    line_of,
    printed,
    reconstruction_of,
    shared_lpips,
    truth_of,
)
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio

from fl_app.audit import auditor, leakage_log, perceptual
from fl_app.audit.auditor import Auditor
from fl_app.audit.leakage_log import Score, append_line, read_lines, thinned
from fl_app.audit.metrics import (
    MEASURES,
    assign,
    feature_mse,
    psnr,
    score,
    ssim,
    total_variation,
)
from fl_app.audit.pictures import save_picture
from fl_app.audit.truth import write_truth
from fl_app.config import AuditConfig, Config, from_yaml
from fl_app.models import create_model
from fl_app.protocol import LABEL_LEVELS, Knowledge, LocalTraining, Observation
from fl_app.runs import folder as runs
from fl_app.util.vision import import_lpips, import_torchvision

# --- metrics ---------------------------------------------------------------------------------


def test_metrics_by_hand_and_against_scikit_image() -> None:
    x, y = images(2, 0), images(2, 1)
    half = torch.full((1, *SHAPE), 0.5)
    # An error of 0.1 everywhere: MSE 0.01, so 20 dB with a range of 1.
    assert psnr(half + 0.1, half).item() == pytest.approx(20, abs=1e-4)
    expected = peak_signal_noise_ratio(x[0].numpy(), y[0].numpy(), data_range=1)
    assert psnr(x, y)[0].item() == pytest.approx(expected, abs=1e-4)
    assert psnr(x, x).tolist() == [100, 100]
    ramp = torch.tensor([[0.0, 0.2, 0.4], [0.5, 0.7, 0.9]]).expand(1, 3, 2, 3)
    assert total_variation(ramp, ramp).item() == pytest.approx(0.2 + 0.5)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    # Two constant images: SSIM is its luminance term (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2.
    a, b, c1 = 0.2, 0.6, 1e-4
    grey = ssim(torch.full((1, *SHAPE), a), torch.full((1, *SHAPE), b)).item()
    assert grey == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)
    doubled = feature_mse(lambda z: 2 * z)
    assert doubled(x, y).tolist() == pytest.approx((4 * MEASURES["mse"](x, y)).tolist())


def test_assignment_is_the_best_of_all_permutations() -> None:
    x = images(4, 0)
    y = (0.3 * images(4, 1) + 0.7 * x)[torch.tensor([2, 0, 3, 1])]
    order = assign(y, x)
    assert order.tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match=r"\(3, 3, 32, 32\).*\(4, 3, 32, 32\)"):
        assign(y[:3], x)


def test_shuffling_the_reconstructions_changes_no_score() -> None:
    x = images(5, 0)
    y = (x + 0.2 * images(5, 1)).clamp(0, 1)
    truth = truth_of(x, ((0, 1), (2,), (3, 4), (0, 1)))
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    plain = score(reconstruction_of(y), truth, MEAN)
    shuffled = score(reconstruction_of(y[shuffle], tuple(shuffle.tolist())), truth, MEAN)
    assert plain.metrics == shuffled.metrics
    assert plain.psnr_by_step == shuffled.psnr_by_step
    assert plain.label_accuracy is None
    assert plain.reasons["label_accuracy"] == "labels were given: by-step"

    values = psnr(y, x).tolist()
    first = (values[0] + values[1]) / 2
    assert plain.psnr_by_step[:2] == pytest.approx((first, values[2]))
    assert plain.psnr_by_step[3] is None and "psnr_by_step" in plain.reasons


def test_grey_baseline_is_the_score_of_the_mean_colour() -> None:
    x = images(3)
    leakage = score(reconstruction_of(images(3, 1)), truth_of(x), MEAN)
    by_hand = [
        -10 * math.log10(sum(((x[i, c] - MEAN[c]) ** 2).mean().item() for c in range(3)) / 3)
        for i in range(3)
    ]
    found = leakage.metrics["psnr"]
    assert found is not None and found.baseline == pytest.approx(sum(by_hand) / 3, abs=1e-4)
    # The median of three, and of their tenth the one that leaks most.
    assert (found.median, found.worst_tenth) == (sorted(found.values)[1], max(found.values))
    # Each image's own mean colour beats any other colour.
    own = psnr(x.mean((2, 3), keepdim=True).expand_as(x), x)
    assert leakage.single_colour == tuple(own.tolist()) and float(own.mean()) > found.baseline


@pytest.mark.parametrize(
    ("bad", "words"),
    [(torch.full((1, *SHAPE), math.nan), "finite"), (torch.full((1, *SHAPE), 1.5), "span 1.5")],
)
def test_a_reconstruction_that_is_no_image_is_refused(bad: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        score(reconstruction_of(bad), truth_of(images(1)), MEAN)


def test_a_metric_that_can_not_be_had_is_null_with_its_reason() -> None:
    small = images(2, size=8)
    leakage = score(reconstruction_of(small), truth_of(small), MEAN, reasons={"lpips_vgg": "off"})
    assert leakage.metrics["ssim"] is None and "SSIM needs sides of 11" in leakage.reasons["ssim"]
    assert leakage.metrics["lpips_vgg"] is None and leakage.reasons["lpips_vgg"] == "off"


# --- LPIPS -----------------------------------------------------------------------------------


def test_torchvision_and_lpips_import_beside_any_torch() -> None:
    assert import_torchvision() is import_torchvision()
    assert import_lpips().LPIPS


def test_lpips_with_trunks_from_a_folder() -> None:
    folder = shared_lpips()
    measures, reasons = perceptual.load_lpips(str(folder))
    assert reasons == {}
    x = images(2)
    y = (x + 0.3 * images(2, 1)).clamp(0, 1)
    for measure in measures.values():
        distance = measure(x, y)
        assert distance.shape == (2,) and (distance > 0.01).all()
        assert torch.allclose(distance, measure(y, x))
        assert measure(x, x).tolist() == [0, 0]
    with pytest.raises(ValueError, match="31 or more"):
        measures["lpips_alex"](images(1, size=28), images(1, size=28))

    weights = load_file(folder / "alexnet_features.safetensors")
    trunk = perceptual._network("lpips_alex", weights).net.state_dict()  # type: ignore[union-attr]
    assert len(trunk) == len(weights) == 10
    assert torch.equal(trunk["slice3.6.weight"], weights["features.6.weight"].float())


def test_lpips_agrees_with_its_formula() -> None:
    """A slow, obvious LPIPS: unit-length features, squared difference, heads, spatial mean."""
    folder = shared_lpips()
    measures, _ = perceptual.load_lpips(str(folder))
    vision, weights = import_torchvision(), load_file(folder / "alexnet_features.safetensors")
    features = vision.models.alexnet().features.eval()
    features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items()})
    heads_file = Path(import_lpips().__file__).parent / "weights" / "v0.1" / "alex.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, y = images(1), images(1, 1)
    expected, after_relu = 0.0, {1: 0, 4: 1, 7: 2, 9: 3, 11: 4}
    with torch.no_grad():
        a, b = ((2 * z - 1 - shift) / scale for z in (x, y))
        for i, layer in enumerate(features[:12]):
            a, b = layer(a), layer(b)
            if i in after_relu:
                difference = (a / a.norm(dim=1) - b / b.norm(dim=1)).square()
                head = heads[f"lin{after_relu[i]}.model.1.weight"]
                expected += (difference * head).sum(1).mean().item()
    assert measures["lpips_alex"](x, y).item() == pytest.approx(expected, rel=1e-3)


def test_without_weights_lpips_is_a_reason_not_a_random_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert perceptual.load_lpips(str(tmp_path))[0] == {}

    def offline(url: str, **_: object) -> None:
        assert socket.getdefaulttimeout() == 10
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    measures, reasons = perceptual.load_lpips("download")
    assert measures == {} and "no network" in reasons["lpips_vgg"]
    assert socket.getdefaulttimeout() is None


# --- the log ---------------------------------------------------------------------------------


def score_of(mean: float) -> Score:
    return Score(mean=mean, low=None, high=None, baseline=1.0)


def test_log_lines_are_strict_json_even_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    append_line(path, line_of(losses=(1.0, math.nan), metrics={"psnr": score_of(math.inf)}))
    (line,), bad = read_lines(path)
    assert bad == [] and line["losses"] == [1.0, None] and line["metrics"]["psnr"]["mean"] is None
    assert line["reasons"] == {
        "metrics.psnr.mean": "not finite (inf)",
        "losses": "not finite (nan)",
    }
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_a_torn_line_is_counted_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    append_line(path, line_of())
    with path.open("a") as file:
        file.write('{"round": 2, "no')
    assert [len(found) for found in read_lines(path)] == [1, 1]
    append_line(path, line_of(round=3))
    lines, (bad,) = read_lines(path)
    assert [line["round"] for line in lines] == [1, 3]
    assert str(bad).startswith(f"{path}, line 2 is left out: it is no JSON")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"round": "1"}, "round is '1'; allowed: a whole number"),
        ({"round": True}, "round is True; allowed: a whole number"),
        ({"round": 10**400}, "round is a number beyond 2\\^64"),
        ({"client": 1.5}, "client is 1.5; allowed: a whole number or null"),
        ({"status": "fine"}, "status is 'fine'; allowed: one of ok, failed, skipped"),
        ({"metrics": []}, r"metrics is \[\]; allowed: an object"),
        ({"metrics": {"psnr": {"mean": 1.0}}}, "metrics.psnr.(baseline|high|low) is missing"),
        ({"metrics": {"psnr": {**score_of(1.0), "mean": "x"}}}, "metrics.psnr.mean is 'x'"),
        ({"reference_free": {"tv": 3}}, "reference_free.tv is 3"),
        ({"losses": [1, None, "x"]}, r"losses\[2\] is 'x'; allowed: a number or null"),
        ({"options": {"a": [[[[[[[[[[1]]]]]]]]]]}}, "options.a is nested too deeply"),
        ({"label_accuracy": 0.5}, "label_accuracy and label_chance"),
        ({"picture": "../../etc/passwd"}, "picture is '../../etc/passwd'; allowed: reconst"),
        ({"picture": "/x.png"}, "picture"),
        ({"schema": 2}, "its schema is 2; this version reads 1"),
        ({"schema": {}}, "its schema is {}"),
    ],
)
def test_a_line_with_wrong_values_is_left_out_and_named(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    path = tmp_path / "leakage.jsonl"
    append_line(path, line_of())
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | fields) + "\n" + json.dumps(good))
    lines, (bad,) = read_lines(path)
    assert lines == [good] and good["schema"] == 1
    assert str(bad).startswith(f"{path}, line 1 is left out: ") and re.search(words, bad.why)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{}", "round is missing"),
        (b"[]", r"it is \[\]; allowed: an object"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"round": ' * 10**5, "nested too deeply"),
        (b"NaN", "NaN is no number"),
        (b"1" * 5000, "it is no JSON"),
        (b"\x00\xff", "it is no JSON"),
        (b"1" * (2**24 + 9), "more than 16,777,216 bytes"),
    ],
)
def test_what_is_no_line_is_left_out_and_named(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "leakage.jsonl"
    append_line(path, line_of())
    good = path.read_bytes()
    path.write_bytes(good + raw + b"\n" + good)
    lines, (bad,) = read_lines(path)
    assert len(lines) == 2 and bad.number == 2 and re.search(words, bad.why)


def test_a_log_that_is_no_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    os.mkfifo(path)
    assert read_lines(path)[0] == [] and "it is a pipe" in str(read_lines(path)[1][0])
    path.unlink()
    path.mkdir()
    assert "it is a folder" in str(read_lines(path)[1][0])


def test_a_line_of_an_older_version_has_every_field(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    old = {"round": 1, "node": 7, "client": 0, "attack": "sme", "status": "ok", "labels": "given"}
    path.write_text(json.dumps({**old, "explanation": "of another name"}))
    (line,), bad = read_lines(path)
    assert bad == [] and line == json.loads(json.dumps(asdict(line_of())))
    assert line["labels"] == "by-step"  # which is what 0.1 granted


def test_a_line_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    with pytest.raises(ValueError, match=r"options.seen is .*; allowed: what JSON can hold"):
        append_line(path, line_of(options={"seen": object()}))
    assert not path.exists()


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    append_line(path, line_of())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a disk with 20 bytes left: the kernel writes the first 20 and stops.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match=r"leakage\.jsonl"):
            append_line(path, line_of(round=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    append_line(path, line_of(round=3))
    assert [line["round"] for line in read_lines(path)[0]] == [1, 3]


def test_losses_are_thinned_with_both_ends_kept() -> None:
    losses = [float(i) for i in range(12345)]
    kept = thinned(losses)
    assert len(kept) == leakage_log.MAX_LOSSES and kept[0] == 0 and kept[-1] == 12344
    assert thinned(losses[:7]) == losses[:7]


# --- runs, pictures, the auditor -------------------------------------------------------------


def test_a_second_run_never_overwrites_the_first(tmp_path: Path) -> None:
    config = Config(name="night", runs_dir=str(tmp_path), seed=3)
    first, second = runs.create_run(config), runs.create_run(config)
    assert [first.name, second.name] == ["night", "night-2"]
    assert first.stat().st_mode & 0o777 == 0o700
    assert from_yaml(first / "config.yaml") == config
    written = (first / "config.yaml").read_text()
    assert "started:" in written and "git_commit:" in written and "flwr:" in written
    assert runs.list_runs(tmp_path) == [first, second]
    assert runs.find_run(tmp_path, "night-2") == second
    with pytest.raises(FileNotFoundError, match=r"no run 'day'.*night, night-2"):
        runs.find_run(tmp_path, "day")


def test_a_run_is_found_by_its_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flowleak attack --out leak` leaves a run in the working folder, not in runs/."""
    here = runs.create_run(Config(name="leak", runs_dir=str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "runs"
    assert [runs.find_run(other, name) for name in ("leak", "leak/", str(here))] == [here] * 3
    named = runs.create_run(Config(name="leak", runs_dir=str(other)))
    assert runs.find_run(other, "leak") == named


def test_picture_shows_the_pixels_side_by_side(tmp_path: Path) -> None:
    private, found = torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)
    found[0, 0] = 0
    save_picture(tmp_path / "p.png", found, private, ["a"])
    with Image.open(tmp_path / "p.png") as picture:
        left, right = (picture.getpixel((x, picture.height - 30)) for x in (20, 120))
    assert (left, right) == ((0, 0, 0), (0, 255, 255))


class Audit:
    """An auditor of one update of a ConvNet, without LPIPS."""

    def __init__(self, tmp_path: Path, settings: AuditConfig) -> None:
        config = Config(runs_dir=str(tmp_path), audit=settings)
        knowledge = Knowledge("convnet", 10, SHAPE, MEAN, (0.2, 0.2, 0.2), LocalTraining())
        w0 = create_model("convnet", 10, SHAPE, seed=0).state_dict()
        self.observation = Observation(w0, w0, num_examples=4, round=1, node=7, client=2)
        self.run_dir = runs.create_run(config)
        self.auditor = Auditor(self.run_dir, config, knowledge)


def test_auditor_scores_draws_and_logs(tmp_path: Path) -> None:
    audit = Audit(tmp_path, AuditConfig(lpips_weights=str(tmp_path)))
    auditor, observation = audit.auditor, audit.observation
    with pytest.raises(ValueError, match=r"client 2 left no truth.*audit.labels=unknown"):
        auditor.grant(observation)
    x = images(4)
    write_truth(audit.run_dir, truth_of(x))
    granted = auditor.grant(observation)
    assert (granted.labels, granted.labels_level) == ((0, 1, 2, 3), "counts")

    auditor.record(observation, reconstruction_of((x + 0.1 * images(4, 1)).clamp(0, 1).flip(0)))
    auditor.record(observation, replace(reconstruction_of(images(4, 2)), diagnosis=("noisy",)))
    auditor.record(observation, reconstruction_of(torch.full((4, *SHAPE), math.nan)))
    auditor.record_failure(observation, "sme", "out of memory [/oops]")
    auditor.record_skipped(2, 9, "the update has no arrays")
    good, poor, broken, failed, skipped = auditor.lines()

    assert good["status"] == "ok" and good["client"] == 2 and good["labels"] == "counts"
    assert good["metrics"]["psnr"]["mean"] > 20 > good["metrics"]["psnr"]["baseline"]
    assert good["labels_source"] == "given" and good["label_accuracy"] is None
    assert good["metrics"]["lpips_vgg"] is None
    assert "No such file" in good["reasons"]["lpips_vgg"]
    # FMSE: features of the sent model, on normalised images.
    model = create_model("convnet", 10, SHAPE, seed=0)
    found = load_file((audit.run_dir / good["picture"]).with_suffix(".safetensors"))
    assert found["assignment"].tolist() == [3, 2, 1, 0]
    matched = found["images"][found["assignment"]]
    center = torch.tensor(MEAN).view(3, 1, 1)
    with torch.no_grad():
        a, b = (model.features((z - center) / 0.2) for z in (matched, x))  # type: ignore[operator]
    expected = (a - b).square().mean(1).tolist()
    assert good["metrics"]["fmse"]["values"] == pytest.approx(expected, rel=1e-4)

    assert poor["picture"] != good["picture"]  # the same attack on the same update, again
    assert broken["status"] == "failed" and "finite" in broken["error"]
    assert failed["status"] == "failed" and skipped["status"] == "skipped"
    assert skipped["client"] is None and "client" in skipped["reasons"]

    text = printed(auditor.lines())
    rows = [row for row in text.splitlines() if "sme" in row or "flow_matching" in row]
    assert "no better than the mean" not in rows[0] and "no better than the mean" in rows[1]
    assert "client 2 (node 7), sme failed: out of memory [/oops]" in text
    assert "client 2 (node 7), sme: noisy" in text
    assert "(node 9), flow_matching skipped: the update has no arrays" in text


@pytest.mark.parametrize("level", LABEL_LEVELS)
def test_a_runs_log_table_and_picture_name_what_was_granted_of_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    captions: list[str] = []
    monkeypatch.setattr(auditor, "save_picture", lambda *given: captions.extend(given[3]))
    audit = Audit(tmp_path, AuditConfig(truth=True, labels=level))
    x = images(4)
    write_truth(audit.run_dir, truth_of(x))
    assert audit.auditor.grant(audit.observation).labels_level == level
    found = replace(reconstruction_of(x, (0, 1, 2, 2)), labels_level=level)
    audit.auditor.record(audit.observation, found)
    audit.auditor.record_failure(audit.observation, "sme", "out of memory")
    lines = audit.auditor.lines()
    assert [line["labels"] for line in lines] == [level] * 2
    assert captions[0] == f"round 1, client 2, sme, labels {level}"
    words = "labels unknown: 75% inferred, chance 40%" if level == "unknown" else f"labels {level}"
    assert words in printed(lines[:1], width=200)


def test_without_truth_there_are_no_scores(tmp_path: Path) -> None:
    audit = Audit(tmp_path, AuditConfig(truth=False, labels="unknown"))
    assert audit.auditor.grant(audit.observation).labels is None
    audit.auditor.record(audit.observation, reconstruction_of(images(4)))
    (line,) = audit.auditor.lines()
    assert line["status"] == "ok" and line["metrics"] == {} and line["losses"] == [0.5, 0.25]
    assert line["reasons"]["metrics"] == "no truth" and line["iterations_per_second"] == 4
    assert (audit.run_dir / line["picture"]).exists()
    assert not (audit.run_dir / "truth").exists()
    assert "no truth" in printed([line])

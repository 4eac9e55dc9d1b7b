"""Who is exposed: identified images, recognisable ones, and what is said beside a mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.audit import MEAN, images, line_of, printed, reconstruction_of, shared_lpips, truth_of
from helpers.runs import recorded_run

from fl_app.audit.auditor import Auditor
from fl_app.audit.exposure import (
    RECOGNISABLE,
    identified_of,
    mean_single_colour,
    recognised_of,
    summary_of,
    summary_over,
    verdict,
)
from fl_app.audit.identification import Identifier, Likeness, choose_likeness, distances
from fl_app.audit.leakage_log import append_line, read_lines
from fl_app.audit.metrics import psnr, score, ssim
from fl_app.audit.perceptual import load_lpips
from fl_app.config import load_config
from fl_app.data import DataError, ImageSet, dataset_info, draw_class, load_split

PIXELS = Likeness(lambda x: (x,), "pixels", 500)


def bytes_of(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    return (255 * images(n, seed, size)).round().to(torch.uint8)


def among(pool: torch.Tensor, likeness: Likeness = PIXELS) -> Identifier:
    return Identifier(lambda label, count: pool, likeness)


# --- identification --------------------------------------------------------------------------


def test_an_image_with_noise_is_identified_and_another_of_its_class_is_not() -> None:
    pool = bytes_of(20)
    private = pool[:3].float() / 255
    noise = 0.1 * torch.randn(private.shape, generator=torch.Generator().manual_seed(1))
    found = among(pool)((private + noise).clamp(0, 1), private, (4, 4, 4))
    assert found.identified == (True,) * 3 and found.rank == (1, 1, 1)
    assert found.candidates == (19, 19, 19) and found.by == "pixels"
    others = pool[5:8].float() / 255
    lost = among(pool)(others, private, (4, 4, 4))
    assert lost.identified == (False,) * 3 and min(r for r in lost.rank if r) > 1
    # The other private images of the class are among the candidates, too.
    assert among(pool[:3])(private.roll(1, 0), private, (4, 4, 4)).identified == (False,) * 3


def test_copies_of_the_private_image_are_no_candidates() -> None:
    pool = bytes_of(6)
    private = pool[:1].float() / 255
    found = among(torch.cat([pool, pool[:1], pool[:1]]))(private, private, (0,))
    assert found.identified == (True,) and found.candidates == (5,)
    # One that is as far away as the private image is not told from it.
    grey = torch.full((1, 3, 32, 32), 0.5)
    symmetric = among((255 * (1 - private)).round().to(torch.uint8))(grey, private, (0,))
    assert symmetric.rank in ((1,), (2,))
    same = Likeness(lambda x: (torch.ones(len(x), 1),), "nothing", 500)
    assert among(pool, same)(private, private, (0,)).rank == (6,)


def test_a_class_without_another_image_is_none_and_all_of_them_a_reason() -> None:
    pool = bytes_of(4)
    private = pool[:2].float() / 255
    by_class = {0: pool[:1], 1: pool[1:]}
    found = Identifier(lambda label, count: by_class[label], PIXELS)(private, private, (0, 1))
    assert found.identified == (None, True) and found.candidates == (0, 2)
    assert found.rank == (None, 1)
    with pytest.raises(ValueError, match="no private image has another image of its class"):
        among(pool[:0])(private, private, (0, 1))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), the private ones \(3, 32, 32\)"):
        among(bytes_of(3, size=8))(private, private, (0, 1))


def test_a_guess_is_right_as_often_as_chance_says() -> None:
    pool, count = bytes_of(10, 3, 4), 600
    places = torch.arange(count) % 10
    private = pool[places].float() / 255
    found = among(pool)(images(count, 4, 4), private, (0,) * count)
    counted = identified_of([{"identification": found.__dict__}])
    assert counted is not None and counted["chance"] == pytest.approx(0.1)
    assert counted["count"] / counted["of"] == pytest.approx(0.1, abs=0.04)


def test_distances_by_hand() -> None:
    one = [torch.tensor([0.0, 0.0]), torch.tensor([1.0])]
    others = [torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0], [3.0]])]
    # Squared: 25 and 1, of mean 13; 0 and 4, of mean 2.
    assert distances(one, others).tolist() == pytest.approx([25 / 13, 1 / 13 + 2])
    assert distances([torch.ones(2)], [torch.ones(3, 2)]).tolist() == [0, 0, 0]


def test_without_lpips_the_model_and_the_pixels_decide() -> None:
    both = choose_likeness(None, lambda x: x.mean((2, 3)), (3, 32, 32))
    assert both.by == "the target model's features and pixels"
    pool = bytes_of(20)
    private = pool[:2].float() / 255
    noisy = (private + 0.1 * images(2, 9)).clamp(0, 1)
    assert among(pool, both)(noisy, private, (0, 0)).identified == (True, True)
    assert among(pool, both)(noisy.flip(0), private, (0, 0)).identified == (False, False)
    with pytest.raises(ValueError, match="neither LPIPS-Alex nor"):
        choose_likeness(None, None, (3, 32, 32))
    small, large = (choose_likeness(None, lambda x: x, (3, n, n)).most for n in (32, 256))
    assert small > large == 50


def test_lpips_decides_where_it_is_there_and_takes_the_images() -> None:
    lpips = load_lpips(str(shared_lpips()))[0]["lpips_alex"]
    likeness = choose_likeness(lpips, None, (3, 32, 32))
    assert likeness.by == "LPIPS-Alex"
    pool = load_split(load_config().dataset, "test").images
    private = pool[:2].float() / 255
    blurred = torch.nn.functional.avg_pool2d(private, 2).repeat_interleave(2, 2)
    blurred = blurred.repeat_interleave(2, 3)
    assert among(pool, likeness)(blurred, private, (0, 0)).identified == (True, True)
    assert among(pool, likeness)(blurred.flip(0), private, (0, 0)).identified == (False, False)
    # Its distances are LPIPS itself.
    away = distances([lpips.features(blurred[:1])[0]], [lpips.features(private)])
    measured = lpips(blurred[:1].expand(2, -1, -1, -1), private)
    assert torch.allclose(away, (measured / measured.mean()).double(), rtol=1e-4)
    features = choose_likeness(lpips, lambda x: x, (3, 28, 28))
    assert features.by == "the target model's features and pixels"


# --- candidates ------------------------------------------------------------------------------


def test_candidates_are_of_one_class_and_the_same_for_a_seed() -> None:
    split = ImageSet(bytes_of(10, size=4), torch.arange(10) % 2)
    drawn = split.of_class(1, 3, seed=0)
    odd = {image.numpy().tobytes() for image in split.images[1::2]}
    assert len({image.numpy().tobytes() for image in drawn} & odd) == 3
    assert torch.equal(drawn, split.of_class(1, 3, seed=0))
    assert len(split.of_class(1, 99, 0)) == 5 and len(split.of_class(7, 99, 0)) == 0
    config = load_config().dataset
    whole = load_split(config, "train")
    drawn = draw_class(config, "train", 1, 4, 0)
    own = {image.numpy().tobytes() for image in whole.images[whole.labels == 1]}
    assert len({image.numpy().tobytes() for image in drawn} & own) == 4
    assert draw_class(config, "train", 10**6, 4, 0).shape == (0, 3, 32, 32)


# --- what is said beside a mean --------------------------------------------------------------


def test_median_and_the_worst_tenth() -> None:
    values = [float(i) for i in range(20)]
    assert summary_of("psnr", values) == {"median": 9.5, "worst_tenth": 18.5}
    assert summary_of("lpips_alex", values) == {"median": 9.5, "worst_tenth": 0.5}
    # Of fewer than ten images it is the one that leaks most, of eleven the two.
    assert summary_of("ssim", [0.1, 0.9, 0.2])["worst_tenth"] == 0.9
    assert summary_of("psnr", values[:11])["worst_tenth"] == 9.5
    assert summary_of("tv", [1.0])["worst_tenth"] is None
    # Over clients it is of all their images; lines of before may have none.
    scores = [{"values": values[:10]}, None, {"mean": 3.0}, {"values": [*values[10:], None]}]
    assert summary_over("psnr", scores) == summary_of("psnr", values)
    assert summary_over("psnr", [{}]) == {"median": None, "worst_tenth": None}


def test_below_a_single_colour_there_is_no_structure() -> None:
    assert verdict(11.0, 12.0, 15.0) == "no better than the mean colour"
    assert verdict(14.0, 12.0, 15.0) == "no structure"
    assert verdict(16.0, 12.0, 15.0) == verdict(14.0, 12.0, None) == ""
    x = load_split(load_config().dataset, "test").images[:4].float() / 255
    found = score(reconstruction_of(x), truth_of(x), MEAN)
    own = psnr(x.mean((2, 3), keepdim=True).expand_as(x), x)
    darker = psnr((x.mean((2, 3), keepdim=True) - 0.02).expand_as(x), x)
    assert found.single_colour == tuple(own.tolist()) and (own > darker).all()
    assert mean_single_colour([{"single_colour": [1.0, None]}, {"single_colour": [3.0]}, {}]) == 2


def test_other_images_of_a_class_are_not_recognisable_and_noise_of_20_db_is() -> None:
    split = load_split(load_config().dataset, "train")
    x = split.images.float() / 255
    by_class = [x[split.labels == label] for label in split.labels.unique()]
    pairs = torch.cat([ssim(own, own.roll(len(own) // 2, 0)) for own in by_class])
    assert (pairs > RECOGNISABLE).double().mean() < 0.03
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert (ssim((x + noise).clamp(0, 1), x) > RECOGNISABLE).double().mean() > 0.5


def test_recognisable_is_ssim_above_the_threshold_beside_its_chance() -> None:
    x = images(3)
    y = torch.cat([x[:2], images(1, 8)])
    found = score(reconstruction_of(y), truth_of(x), MEAN)
    assert found.recognisable == (True, True, False) and found.recognisable_chance == 0
    counted = recognised_of([found.__dict__, {"recognisable": None}, {}])
    assert counted == {"count": 2, "of": 3, "chance": 0.0} and recognised_of([{}]) is None
    small = images(2, size=8)
    unknown = score(reconstruction_of(small), truth_of(small), MEAN)
    assert unknown.recognisable is None and "SSIM needs" in unknown.reasons["recognisable"]


def test_why_nothing_is_identified_is_said() -> None:
    x = images(2)
    found = score(reconstruction_of(x), truth_of(x), MEAN)
    assert found.identification is None
    assert found.reasons["identification"] == "no data set to compare the private images with"

    def broken(*_: object) -> None:
        raise DataError("the data set is not here")

    found = score(reconstruction_of(x), truth_of(x), MEAN, identify=broken)  # type: ignore[arg-type]
    assert found.identification is None and "not here" in found.reasons["identification"]


# --- the log and the auditor -----------------------------------------------------------------


def test_a_run_says_who_is_identified(tmp_path: Path) -> None:
    base = f"runs_dir={tmp_path} audit.lpips_weights={tmp_path} client.batch_size=2"
    folder, observation, truth = recorded_run(load_config({"overrides": base}))
    config = load_config({"overrides": base})
    knowledge = config.knowledge(dataset_info(config.dataset))
    found = replace(reconstruction_of(truth.images, truth.labels), options={})
    Auditor(folder, config, knowledge).record(observation, found)
    Auditor(folder, config, knowledge, no_data="it is not here").record(observation, found)
    known, unknown = read_lines(folder / "leakage.jsonl")[0]
    count = len(truth.labels)
    assert known["identification"]["identified"] == [True] * count
    assert known["recognisable"] == [True] * count and len(known["single_colour"]) == count
    own = np.array(known["identification"]["candidates"])
    sizes = load_split(config.dataset, "train").labels.bincount()[list(truth.labels)]
    assert (own <= sizes.numpy()).all() and (own > 0).all()
    assert unknown["identification"] is None
    assert unknown["reasons"]["identification"] == "it is not here"
    text = printed([known, unknown])
    assert f"{count} of {count}" in text and f"- of {count}" in text
    narrow = printed([known, unknown], width=80).splitlines()
    assert max(map(len, narrow)) <= 80 and not any("…" in row for row in narrow)
    # The attack's last line on the update counts for the run.
    assert f"{count} of {count} recognisable (SSIM over 0.5, chance " in " ".join(text.split())
    assert "identified (" not in text
    text = " ".join(printed([known]).split())
    assert "sme, 1 update: PSNR 100.0 dB, median 100.0, worst tenth 100.0;" in text
    assert f"{count} of {count} identified (nearest of " in text
    assert "of the class by the target model's features and pixels, chance" in text


def test_lines_of_before_are_read_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    scores = {"mean": 20.0, "low": 15.0, "high": 25.0, "baseline": 12.0, "values": [19.0, 21.0]}
    append_line(path, line_of())
    old = json.loads(path.read_text())
    for name in ("single_colour", "recognisable", "recognisable_chance", "identification"):
        del old[name]
    path.write_text(json.dumps({**old, "metrics": {"psnr": scores}}))
    (line,), bad = read_lines(path)
    assert bad == [] and line["identification"] is None and line["single_colour"] == []
    assert "20.0" in printed([line]) and "- of 2" in printed([line])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"identified": [True, True]}, "not of the same images"),
        ({"candidates": [-1]}, "candidates has -1"),
        ({"identified": [1]}, r"identified\[0\] is 1"),
    ],
)
def test_a_damaged_identification_is_left_out(
    tmp_path: Path, wrong: dict[str, list[int]], words: str
) -> None:
    good = {"identified": [True], "rank": [1], "candidates": [9], "by": "LPIPS-Alex"}
    path = tmp_path / "leakage.jsonl"
    append_line(path, line_of(identification=good))
    line = json.loads(path.read_text())
    path.write_text(json.dumps({**line, "identification": {**good, **wrong}}))
    lines, (bad,) = read_lines(path)
    assert lines == [] and words.replace("\\", "") in str(bad)

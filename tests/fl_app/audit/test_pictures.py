"""What stands below the pairs of a picture, and how the tables of runs look on any terminal."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.audit import images, line_of, printed, reconstruction_of, truth_of
from helpers.command import flowleak
from helpers.reports import Pretence
from PIL import Image

from fl_app.audit.identification import Identification
from fl_app.audit.metrics import score
from fl_app.audit.pictures import pair_notes, save_picture


def test_each_pair_has_its_score_and_class(tmp_path: Path) -> None:
    truth = truth_of(images(3))
    found = reconstruction_of((truth.images + 0.1).clamp(0, 1), (0, 2, 1))
    leakage = score(found, truth, (0.5, 0.5, 0.5), num_classes=10)
    known = Identification((True, None, False), (1, None, 3), (9, 0, 9), "LPIPS")
    notes = pair_notes(replace(leakage, identification=known), truth.labels, found.labels)
    psnr = leakage.metrics["psnr"]
    assert psnr
    assert notes == [
        (f"image 0: {psnr.values[0]:.1f} dB, identified", "class 0"),
        (f"image 1: {psnr.values[1]:.1f} dB", "class 1, taken for 2"),
        (f"image 2: {psnr.values[2]:.1f} dB", "class 2, taken for 1"),
    ]
    assert pair_notes(None, (), (4,)) == [("image 0", "class 4 by the attack")]
    sizes = []
    for number, words in enumerate(([], notes)):
        path = tmp_path / f"{number}.png"
        save_picture(path, found.images, truth.images, ["caption"], words)
        with Image.open(path) as picture:
            sizes.append(picture.height)
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_can_be_read_on_any_terminal(width: int) -> None:
    value = {"mean": 20.04, "median": 20.1, "worst_tenth": 30.2, "baseline": 12.3, "values": [1.0]}
    line = asdict(line_of(metrics={"psnr": value}, single_colour=(14.1,), recognisable=(True,)))
    shown = printed([line], width=width)
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    assert all(number in shown for number in ("20.0", "20.1", "30.2", "12.3", "14.1"))
    assert ("worst tenth: 30.2" in shown) == (width == 40)


def test_show_says_which_run_it_is_and_what_was_given(tmp_path: Path) -> None:
    Pretence(clients=1).write(tmp_path)
    shown = flowleak("show", "audit", "--runs-dir", str(tmp_path))
    for words in (
        "audit, 20", "photos, 10 classes, images 3x32x32", "convnet", "adam, lr 0.001",
        "40.0% after round 1", "how many images of each class", "(generous)",
    ):  # fmt: skip
        assert words in shown

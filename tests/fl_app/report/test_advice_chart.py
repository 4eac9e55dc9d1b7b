"""Leakage against accuracy, drawn."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

from helpers.reports import Pretence

from fl_app.report.advice_chart import advice_chart, advice_file
from fl_app.report.collect import collect
from fl_app.report.render import render
from fl_app.report.writing import write_drawing
from fl_app.runs.advice import AS_IT_IS, DRAWING, Advice, privacy_words, write_advice

EVIL = "<img src=x onerror=alert(1)>"
PLACE = ("x", "y", "width", "height")
SVG = "{http://www.w3.org/2000/svg}"
ROWS = [
    Advice(AS_IT_IS, leaked=10, of=10, accuracy=0.45),
    Advice("no better", leaked=10, of=10, accuracy=0.45),
    *(Advice(f"like it {i}", leaked=10 - i % 2, of=10, accuracy=0.44 - i / 100) for i in range(8)),
    Advice(EVIL, leaked=2, of=10, accuracy=0.12, epsilon=1763.4, delta=1e-5),
    Advice("not tried", problem="why"),
]


def test_every_change_has_a_number_that_is_on_no_other() -> None:
    drawn = ElementTree.fromstring(advice_file(ROWS))
    groups = drawn.findall(f"{SVG}g")
    numbers = ", ".join(group.findtext(f"{SVG}text") or "" for group in groups).split(", ")
    assert sorted(map(int, numbers)) == list(range(1, 12)) and len(groups) < 11
    title = groups[-1].findtext(f"{SVG}title")
    assert title == f"{EVIL}: 2 of 10 identified, accuracy 12.0%"
    boxes = []
    for group in groups:
        left, top, width, height = (float(group[1].get(name, "nan")) for name in PLACE)
        boxes.append((left, top, left + width, top + height))
    assert min(box[0] for box in boxes) > 0 and max(box[2] for box in boxes) < 380
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    dots = [float(dot.get("cy", "nan")) for dot in drawn.findall(f"{SVG}circle")]
    assert [dot.get("fill") for dot in drawn.findall(f"{SVG}circle")].count("#9a1b14") == 1
    band = next(each for each in drawn.findall(f"{SVG}rect") if each.get("fill") == "#e6f2ea")
    top = float(band.get("y", "nan"))
    assert [dot > top for dot in dots] == [False] * 10 + [True]
    assert {EVIL, "11", AS_IT_IS, "halves what leaks"} <= {each.text for each in drawn.iter()}


def test_without_accuracies_nothing_is_drawn(tmp_path: Path) -> None:
    assert write_drawing(ROWS, tmp_path) == tmp_path / DRAWING
    unmeasured = [replace(row, accuracy=None) for row in ROWS]
    assert write_drawing(unmeasured, tmp_path) is None and not (tmp_path / DRAWING).exists()
    assert advice_chart(unmeasured) == "" == advice_chart(ROWS[:1])


def test_the_report_shows_all_changes(tmp_path: Path) -> None:
    run = Pretence(clients=1).write(tmp_path)
    write_advice(run, {}, ROWS)
    page = render(collect(run))
    assert advice_chart(ROWS) in page and EVIL not in page
    words = "epsilon 1,763.4 at delta 1e-05, which guarantees next to nothing"
    assert privacy_words(ROWS[10]) == words
    assert f"best 1; {words}" in page and "<td>why</td>" in page
    write_advice(run, {}, [replace(row, accuracy=None) for row in ROWS])
    assert "so that nothing is drawn" in render(collect(run))

"""Every table and figure of the paper, by its command."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command import flowleak

from fl_app.benchmarks.paper.elements import BUDGETS, ELEMENTS, OURS
from fl_app.benchmarks.paper.published import COLUMNS, TABLE_2, TABLE_3, TABLE_4


def test_every_line_of_a_table_stands_below_the_papers() -> None:
    for name, element in ELEMENTS.items():
        for budget in BUDGETS:
            cases = element.cases(budget)
            assert len({case.name for case in cases}) == len(cases), name
            lines = {element.published("cifar10", case) for case in cases}
            assert (None in lines) == name.startswith("figure")
            if name.startswith("table") and budget != "smoke":
                assert {case.attack.name for case in cases} >= {OURS[1]}
    # Two lines read off the paper's page.
    assert TABLE_2["cifar10"]["flow_matching"][0] == 20.861
    assert TABLE_4["precode"]["sme"][:2] == (14.712, 0.369)
    both = [*TABLE_2["cifar10"].values(), *TABLE_2["tiny_imagenet"].values()]
    assert all(len(line) == len(COLUMNS) for line in both)
    assert len({*TABLE_3}) == 5


@pytest.mark.parametrize(
    ("element", "cases"),
    [
        ("--table 1", "B=1, .*flow_matching"),
        ("--table 2", "sme"),
        ("--table 3", "resnet8_wide .*paper"),
        ("--table 4", "clip.* sme"),
        ("--figure 2", ""),
        ("--figure 3", "B=[12].* sme"),
        ("--figure 4", "sme"),
        ("--figure 5", "(sme|dlf)"),
    ],
)
def test_it_is_made_by_one_command(element: str, cases: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    shown = flowleak(
        "bench", "paper", *element.split(), "--budget", "smoke", "--dataset", "photos",
        "--trials", "1", "--out", str(out), "--cases", cases,
    )  # fmt: skip
    drawn = element.startswith("--figure")
    assert out.with_suffix(".png").is_file() == drawn
    if element == "--figure 2":
        assert "mosaic" in shown
        return
    table = out.with_suffix(".md").read_text()
    assert f"flowleak bench paper {element} --budget smoke --dataset photos" in table
    assert "The paper gives no batch size" in table
    if element.startswith("--table") and element != "--table 2":  # that one is of two data sets
        assert "**the paper: " in table

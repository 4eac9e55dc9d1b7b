"""Tables in Markdown."""

from __future__ import annotations

from fl_app.util.markdown import markdown_table, narrowed


def test_what_all_lines_say_leaves_the_table() -> None:
    cells = [
        ["client", "labels", "note", "PSNR"],
        ["a", "counts", "", "20"],
        ["b", "counts", "", "9"],
    ]
    said, table = narrowed(cells)
    assert said == [("labels", "counts")]
    assert table == [["client", "PSNR"], ["a", "20"], ["b", "9"]]
    assert narrowed(cells[:2]) == ([], [["client", "labels", "PSNR"], ["a", "counts", "20"]])


def test_a_bar_in_a_cell_is_no_end_of_it() -> None:
    assert markdown_table([["a|b"], ["c"]]) == [r"| a\|b |", "| --- |", "| c |"]

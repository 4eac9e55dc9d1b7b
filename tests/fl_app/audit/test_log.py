"""The log's schema: of the lines that are written, of the types that are read, of its document."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.audit import images, line_of, reconstruction_of
from helpers.schema import schema_of
from jsonschema import Draft202012Validator

from fl_app.audit.auditor import Auditor
from fl_app.audit.export import COLUMNS, write_export
from fl_app.audit.leakage_log import LogLine, append_line, read_lines
from fl_app.audit.truth import Truth, write_truth
from fl_app.config import load_config
from fl_app.data import dataset_info
from fl_app.protocol import Observation
from fl_app.runs.folder import create_run
from fl_app.util.files import project_file

SCHEMA = json.loads(project_file("fl_app/audit/leakage.schema.json").read_text())
WORDS = ("description", "x-unit", "x-null", "const")


def test_the_schema_is_that_of_the_lines() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    fields = {name: dict(field) for name, field in SCHEMA["properties"].items()}
    for name, field in fields.items():
        described = {word: field.pop(word, "") for word in WORDS}
        assert described["description"].endswith("."), name
        assert bool(described["x-null"]) == ("null" in json.dumps(field)), name
    expected = schema_of(LogLine)
    assert fields == expected["properties"] and SCHEMA["required"] == expected["required"]


def kind(field: dict[str, Any]) -> str:
    """Return a type as the document says it."""
    if "anyOf" in field:
        return " or ".join(map(kind, field["anyOf"]))
    if "enum" in field:
        return ", ".join(field["enum"])
    named = field["type"]
    if named == "array":
        inner = kind(field["items"])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    return named if isinstance(named, str) else " or ".join(named)


def test_the_document_is_that_of_the_schema() -> None:
    text = (Path(__file__).parents[3] / "docs" / "log.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- fields: .*? -->\n\n(.*?)\n\n<!-- /fields -->", text, re.DOTALL)
    assert table
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in table[1].splitlines()[2:]]
    assert rows == [
        [f"`{name}`", kind(field), field.get("x-unit", ""), field.get("x-null", ""),
         field["description"]]
        for name, field in SCHEMA["properties"].items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one update of three images, attacked with and without success, and one skipped."""
    folder = tmp_path_factory.mktemp("runs")
    run = create_run(load_config({"overrides": f"runs_dir={folder} name=x"}))
    config = load_config({"overrides": f"runs_dir={folder} name=x audit.lpips_weights={folder}"})
    auditor = Auditor(run, config, config.knowledge(dataset_info(config.dataset)))
    node = 2**63 + 5  # a real id of Flower's, and no number that a float holds
    weights = {"x": torch.rand(2)}
    seen = Observation(weights, {"x": torch.rand(2)}, 3, round=1, node=node, client=1)
    private = images(3)
    write_truth(run, Truth(private, (4, 0, 2), ((0,), (1,), (2,)), 1, node))
    found = (private + 0.1 * images(3, 1)).clamp(0, 1)[[1, 2, 0]]
    auditor.record(seen, reconstruction_of(found, (0, 2, 3)))
    auditor.record_failure(seen, "dlg", "=1+1")
    auditor.record_skipped(1, 8, "no reply")
    return run


def test_real_lines_are_of_the_schema(run: Path) -> None:
    validator = Draft202012Validator(SCHEMA)
    lines = [json.loads(line) for line in (run / "leakage.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["schema"] == 1 and line["run"] == "x" and line["dataset"] == "photos"
        assert [error.message for error in validator.iter_errors(line)] == []
        assert set(line) == set(SCHEMA["properties"])
    # Labels are in the order of the private images, whatever that of the reconstructions was.
    assert (lines[0]["true_labels"], lines[0]["found_labels"]) == ([4, 0, 2], [3, 0, 2])
    assert [error.json_path for error in validator.iter_errors(lines[0] | {"round": "1"})] == [
        "$.round"
    ]


def test_an_export_has_a_row_an_image(run: Path, tmp_path: Path) -> None:
    lines = read_lines(run / "leakage.jsonl")[0]
    assert write_export(tmp_path / "x.csv", lines, "csv") == 5
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0", "1", "2", "", ""]
    assert list(rows[0]) == list(COLUMNS)
    assert {row["node"] for row in rows} == {str(2**63 + 5), "8"}
    assert [float(row["psnr"]) for row in rows[:3]] == lines[0]["metrics"]["psnr"]["values"]
    assert [(row["true_label"], row["found_label"]) for row in rows[:3]] == [
        ("4", "3"), ("0", "0"), ("2", "2")
    ]  # fmt: skip
    assert rows[3]["error"] == "'=1+1"  # a spreadsheet would take it for a formula
    assert (tmp_path / "x.csv").stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="allowed: csv, parquet"):
        write_export(tmp_path / "x.xls", lines, "xls")


def test_a_parquet_file_holds_the_same_with_types(run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = read_lines(run / "leakage.jsonl")[0]
    write_export(tmp_path / "x.parquet", lines, "parquet")
    table = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["psnr"] for row in table[:3]] == lines[0]["metrics"]["psnr"]["values"]
    assert table[3]["psnr"] is None and table[0]["node"] == str(2**63 + 5)
    huge = [lines[0] | {"flops": 2**64}]
    with pytest.raises(ValueError, match="parquet"):
        write_export(tmp_path / "y.parquet", huge, "parquet")
    assert not (tmp_path / "y.parquet").exists()


def test_a_line_of_an_older_version_is_read_and_exported(tmp_path: Path) -> None:
    path = tmp_path / "leakage.jsonl"
    score = {"mean": 20.0, "baseline": 12.0, "values": [19.0, 21.0]}
    append_line(path, replace(line_of(), metrics={"psnr": score}))
    old = json.loads(path.read_text())
    for name in ("true_labels", "found_labels", "run", "dataset", "prior", "seed", "written"):
        del old[name]
    path.write_text(json.dumps(old) + "\n")
    lines, bad = read_lines(path)
    assert not bad and write_export(tmp_path / "x.csv", lines, "csv") == 2

"""The log as a table, one row an image, attack and update. Free of torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fl_app.audit.images import ImageRow, image_rows
from fl_app.util.extras import extras
from fl_app.util.files import whole_file

FORMATS = ("csv", "parquet")
# Of a line, in each of its rows.
_OF_LINE: Mapping[str, type] = {
    "run": str, "round": int, "node": str, "client": int, "attack": str, "status": str,
    "labels": str, "dataset": str, "prior": str, "seed": int, "defense": str,
    "defense_known": bool, "matching": str, "labels_source": str, "stop_reason": str,
    "iterations": int, "seconds": float, "device": str, "peak_memory": int, "flops": int,
    "num_examples": int, "picture": str, "job": str, "written": str, "error": str,
}  # fmt: skip
_OF_IMAGE: Mapping[str, type] = {
    each.name: next(kind for kind in (bool, int, float) if kind.__name__ in str(each.type))
    for each in fields(ImageRow)
}
COLUMNS: Mapping[str, type] = {**_OF_LINE, **_OF_IMAGE}
"""Names and types; a cell of any may be empty."""


def export_rows(lines: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each image of each line, with every name in `COLUMNS`.

    A line without images, such as one of a failed attack, is one row whose image is None.

    Parameters
    ----------
    lines : iterable of mapping
        Of the log, as `read_lines` gives them.
    """
    for line in lines:
        common = {name: line[name] for name in _OF_LINE}
        rows = image_rows(line)
        for row in rows:
            yield common | {name: getattr(row, name) for name in _OF_IMAGE}
        if not rows:
            yield common | dict.fromkeys(_OF_IMAGE)


def write_export(path: Path, lines: Iterable[Mapping[str, Any]], format_: str) -> int:
    """Write the table of a log, whole or not at all; return how many rows it has.

    Parameters
    ----------
    path : Path
    lines : iterable of mapping
    format_ : {"csv", "parquet"}

    Raises
    ------
    ValueError
        If there is no such format, or what it needs is not installed.
    OSError
        If the file can't be written.
    """
    if format_ not in FORMATS:
        raise ValueError(f"format is {format_!r}; allowed: {', '.join(FORMATS)}")
    rows = list(export_rows(lines))
    with whole_file(path) as temporary:
        (_write_csv if format_ == "csv" else _write_parquet)(temporary, rows)
    return len(rows)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)


def _plain(value: Any) -> Any:
    """Return a cell that a spreadsheet takes for text where it is text, and no formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    with extras():
        import pyarrow as pa
        from pyarrow import parquet
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    try:
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"parquet can't hold the log: {error}") from error

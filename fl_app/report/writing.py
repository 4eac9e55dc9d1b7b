"""The report of a run as a file. Free of torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fl_app.report.advice_chart import advice_file
from fl_app.report.collect import collect
from fl_app.report.model import Report
from fl_app.report.render import render
from fl_app.runs.advice import DRAWING, Advice
from fl_app.util.files import write_text
from fl_app.util.text import reason

REPORT, REDACTED = "report.html", "report-redacted.html"
_log = logging.getLogger("flwr")  # Flower streams it to the user


def write_report(report: Report, run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run, whole or not at all; return where it lies.

    Only its owner can read it.

    Parameters
    ----------
    report : Report
        See `collect`.
    run_dir : Path
        The run's folder.
    out : Path, optional
        Default: `REPORT` in the run's folder, or `REDACTED`. Its links to pictures are
        relative to that folder.

    Raises
    ------
    OSError
        If it can't be written.
    """
    path = out or run_dir / (REDACTED if report.redacted else REPORT)
    write_text(path, render(report))
    return path


def write_drawing(rows: Sequence[Advice], run_dir: Path) -> Path | None:
    """Draw what `flowleak advise` tried, see `advice_file`; None: nothing could be drawn.

    Raises
    ------
    OSError
        If it can't be written.
    """
    path, drawing = run_dir / DRAWING, advice_file(rows)
    if not drawing:
        path.unlink(missing_ok=True)  # of a call that measured accuracies
        return None
    write_text(path, drawing)
    return path


def try_report(run_dir: Path) -> Path | None:
    """Write the report at the end of what a run does; None where that failed.

    Why is logged and goes no further: the run's scores are worth more than their report.
    """
    try:
        return write_report(collect(run_dir), run_dir)
    except Exception as error:  # whatever it is, the run has ended well without
        _log.warning("no report was written: %s: %s", type(error).__name__, reason(error))
        return None

"""From what a report says to its page. Free of torch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fl_app.report.advice_chart import advice_chart
from fl_app.report.charts import loss_chart, step_chart
from fl_app.report.model import Report
from fl_app.report.source import number, plural
from fl_app.report.tables import advice_cells
from fl_app.util.files import project_file


@dataclass(frozen=True)
class Listed:
    """A run in the list of all runs.

    Attributes
    ----------
    name, link, facts : str
    level, sentence : str
        Of its `Verdict`.
    """

    name: str
    link: str
    facts: str
    level: str
    sentence: str


def render(report: Report) -> str:
    """Return a report as one HTML page that asks for nothing from anywhere.

    Whatever it says is escaped: names and errors come from clients and plug-ins. Its policy
    lets it run and look as this package says, show pictures that it holds, and do nothing else.
    """
    style, script = (_shipped(name) for name in ("page.css", "page.js"))
    pairs = [pair for update in report.updates for each in update.attempts for pair in each.pairs]
    pairs.sort(key=lambda pair: (bool(pair.identified), pair.psnr or 0.0), reverse=True)
    return _page("page.html.j2").render(
        report=report,
        policy=_policy(style, script),
        style=Markup(style),  # ours, not escaped
        script=Markup(script),
        loss_chart=loss_chart,
        step_chart=step_chart,
        advice_chart=advice_chart,
        advice_cells=advice_cells,
    )


def render_list(runs: Sequence[Listed]) -> str:
    """Return the page that leads to the reports of some runs, the latest first."""
    style = _shipped("page.css")
    page = _page("list.html.j2")
    return page.render(runs=runs[::-1], policy=_policy(style), style=Markup(style))


def _page(name: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "plural": plural}
    return environment.from_string(_shipped(name))


def _shipped(name: str) -> str:
    return project_file(f"fl_app/report/{name}").read_text(encoding="utf-8")


def _policy(style: str, script: str = "") -> str:
    """Return the Content-Security-Policy of a page with one style, and one script or none."""
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; {scripts}"
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

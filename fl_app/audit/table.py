"""The table of a run, from its log: free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fl_app.audit.exposure import (
    RECOGNISABLE,
    bounds_of,
    chance_words,
    count_words,
    hardly_searched,
    identified_of,
    mean_single_colour,
    recognised_of,
    summary_over,
    verdict,
)
from fl_app.util.intervals import spread, spread_words
from fl_app.util.tables import Fitting
from fl_app.util.text import printable

_SCORES = (
    "PSNR\ndB", "\nmedian", "worst\ntenth", "mean\ncolour", "single\ncolour", "iden-\ntified",
    "\nSSIM",
)  # fmt: skip


def _verdict(line: Mapping[str, Any]) -> str:
    """Say that a line's PSNR, which it has, shows no reconstruction; nothing where it does."""
    score = line["metrics"]["psnr"]
    if None in (score["mean"], score["baseline"]):
        return "PSNR not finite"
    return verdict(score["mean"], score["baseline"], mean_single_colour([line]))


def leakage_table(lines: Sequence[Mapping[str, Any]]) -> Fitting:
    """Return the table of a run from the lines of its log, for a terminal of any width.

    A reconstruction that is no better than the mean colour, or shows no structure, is said
    to be so; failed attacks are red, with their error below the table, as is what the
    diagnosis of the others found, the scores of those without a truth, that a run holds
    private images, whom each attack exposes, and the clients' defence.
    """
    table = Table(
        title="Leakage: PSNR in dB of a client's images; worst tenth: of those that leak most",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for name in ("Round", "Client"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("Attack", overflow="fold", min_width=8)
    for name in _SCORES:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("Note", min_width=10)
    below = Text(justify="left")
    for line in lines:
        note, style = _note(line)
        metrics = line["metrics"]
        cells = [
            str(line["round"]),
            _client(line),
            line["attack"],
            *(_number(metrics, "psnr", name, 1) for name in ("mean", "median", "worst_tenth")),
            _number(metrics, "psnr", "baseline", 1),
            _decimal(mean_single_colour([line]), 1),
            _identified(line),
            _number(metrics, "ssim", "mean", 2),
            note,
        ]
        # Text, not str: a name may look like rich's markup.
        table.add_row(*(Text(printable(cell)) for cell in cells), style=style)
        who = f"client {_client(line)}" if line["client"] is not None else "client unknown"
        where = f"round {line['round']}, {who} (node {line['node']}), {line['attack']}"
        if line["status"] != "ok":
            error = printable(str(line["error"]))
            below.append(f"{where} {line['status']}: {error}\n", style=style)
            continue
        if line["diagnosis"]:
            words = printable("; ".join(line["diagnosis"]))
            below.append(f"{where}: {words}\n", style="yellow")
        if words := hardly_searched(line):
            below.append(f"{where}: {words}\n", style="yellow")
        if line["reference_free"]:
            below.append(f"{where}, no truth: {_alone(line['reference_free'])}\n")
    if any(line["truth"] for line in lines):
        below.append("With Truth: the clients' private batches were there to score with.\n")
    for words in _exposed(lines):
        below.append(words)
    for words in dict.fromkeys(_defence(line) for line in lines):
        below.append(words)
    table.caption = below if below else None
    table.caption_style = "none"
    return Fitting(table)


def _client(line: Mapping[str, Any]) -> str:
    """Return whose update a line is about."""
    if line["clients"]:
        return f"sum of {len(line['clients'])}"
    return "-" if line["client"] is None else str(line["client"])


def _defence(line: Mapping[str, Any]) -> str:
    """Say what the client did against being seen; nothing where it did nothing."""
    if line["defense"] == "none":
        return ""
    known = "known" if line["defense_known"] else "unknown"
    return f"Defence: {line['defense']}, {known} to the attacker.\n"


def _note(line: Mapping[str, Any]) -> tuple[str, str]:
    """Return what to say of a line, and the style to say it in."""
    if line["status"] != "ok":
        return line["status"], "red" if line["status"] == "failed" else "yellow"
    labels = _labels(line)
    if line["metrics"].get("psnr") is None:
        return f"{line['reasons'].get('metrics', 'not scored')}; {labels}", ""
    words = _verdict(line)
    return (f"{words}; {labels}", "dim") if words else (labels, "")


def _identified(line: Mapping[str, Any]) -> str:
    """Return how many of a line's images are identified; how many there are where none can be."""
    found = identified_of([line])
    scored = len((line["metrics"].get("psnr") or {}).get("values") or ())
    return f"- of {scored}" if scored and not found else count_words(found)


def _exposed(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say of each attack how many images it exposes, over all updates that it was scored on.

    An attack's last line on an update counts.
    """
    latest = {(line["attack"], line["round"], line["node"]): line for line in lines}
    for attack in dict.fromkeys(line["attack"] for line in lines):
        ours = [line for line in latest.values() if line["attack"] == attack]
        scores = [line["metrics"]["psnr"] for line in ours if line["metrics"].get("psnr")]
        means = [score["mean"] for score in scores if score["mean"] is not None]
        if not means:
            continue
        updates = f"{len(means)} update{'s' * (len(means) > 1)}"
        words = [f"PSNR {spread_words(spread(means, bounds_of('psnr')), 1)} dB"]
        summary = summary_over("psnr", scores)
        if None not in summary.values():
            words[0] += ", median {median:.1f}, worst tenth {worst_tenth:.1f}".format(**summary)
        if identified := identified_of(ours):
            words.append(f"{count_words(identified)} identified ({chance_words(identified)})")
        if seen := recognised_of(ours):
            chance = f"SSIM over {RECOGNISABLE:g}, chance {seen['chance']:.1%}"
            words.append(f"{count_words(seen)} recognisable ({chance})")
        yield printable(f"{attack}, {updates}: {'; '.join(words)}.") + "\n"


def _alone(scores: Mapping[str, Any]) -> str:
    """Say the scores of a reconstruction that has no truth."""
    words = []
    if scores.get("matching_loss") is not None:
        words.append(f"matching loss {scores['matching_loss']:.3g}")
    for name, what in (("tv", "TV"), ("prior_residual", "prior residual")):
        score = scores.get(name)
        if score and None not in (score["mean"], score["baseline"]):
            words.append(f"{what} {score['mean']:.3f} (noise {score['baseline']:.3f})")
    counted = scores.get("label_counts", {}).items()
    counts = ", ".join(f"{count} of {label}" for label, count in counted)
    return printable("; ".join([*words, *([f"labels: {counts}"] if counts else [])]))


def _labels(line: Mapping[str, Any]) -> str:
    """Say what was given of a line's labels, and how many inferred ones are right."""
    if line["label_accuracy"] is None:
        return f"labels {line['labels']}"
    right = f"{line['label_accuracy']:.0%} inferred, chance {line['label_chance']:.0%}"
    return f"labels unknown: {right}"


def _number(metrics: Mapping[str, Any], name: str, field: str, digits: int) -> str:
    return _decimal((metrics.get(name) or {}).get(field), digits)


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

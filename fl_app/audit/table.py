"""The table of a run, from its log: free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fl_app.util.text import printable


def beats_mean_colour(metrics: Mapping[str, Any]) -> bool:
    """Say whether a line's mean PSNR is above that of the mean-colour baseline."""
    score = metrics["psnr"]
    return None not in (score["mean"], score["baseline"]) and score["mean"] > score["baseline"]


def leakage_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a run from the lines of its log; it fits 80 columns.

    A reconstruction that is no better than the mean colour is said to be so;
    failed attacks are red, with their error below the table, as is what the
    diagnosis of the others found, the scores of those without a truth, that a run
    holds private images, and the clients' defence.
    """
    table = Table(
        title="Leakage: mean over a client's images, PSNR with its 95% interval",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for name in ("Round", "Client"):
        table.add_column(name, justify="right")
    table.add_column("Attack", overflow="fold")
    table.add_column("PSNR dB", justify="right", no_wrap=True)
    for name in ("Mean colour dB", "SSIM", "LPIPS VGG", "LPIPS Alex", "Time s"):
        table.add_column(name, justify="right")
    table.add_column("Note")
    below = Text(justify="left")
    for line in lines:
        note, style = _note(line)
        metrics = line["metrics"]
        cells = [
            str(line["round"]),
            _client(line),
            line["attack"],
            _number(metrics, "psnr", "mean", 1) + _half_width(metrics.get("psnr")),
            _number(metrics, "psnr", "baseline", 1),
            *(_number(metrics, name, "mean", 3) for name in ("ssim", "lpips_vgg", "lpips_alex")),
            f"{line['seconds']:.1f}" if line["status"] == "ok" else "-",
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
        if line["reference_free"]:
            below.append(f"{where}, no truth: {_alone(line['reference_free'])}\n")
    if any(line["truth"] for line in lines):
        below.append("With Truth: the clients' private batches were there to score with.\n")
    for words in dict.fromkeys(_defence(line) for line in lines):
        below.append(words)
    table.caption = below if below else None
    table.caption_style = "none"
    return table


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
    if beats_mean_colour(line["metrics"]):
        return labels, ""
    return f"no better than the mean colour; {labels}", "dim"


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
    return printable("; ".join([*words, f"labels: {counts}"]))


def _labels(line: Mapping[str, Any]) -> str:
    """Say what was given of a line's labels, and how many inferred ones are right."""
    if line["label_accuracy"] is None:
        return f"labels {line['labels']}"
    return f"labels {line['label_accuracy']:.0%}, chance {line['label_chance']:.0%}"


def _number(metrics: Mapping[str, Any], name: str, field: str, digits: int) -> str:
    value = (metrics.get(name) or {}).get(field)
    return "-" if value is None else f"{value:.{digits}f}"


def _half_width(score: Mapping[str, Any] | None) -> str:
    if score is None or score["low"] is None or score["high"] is None:
        return ""
    return f" ±{(score['high'] - score['low']) / 2:.1f}"

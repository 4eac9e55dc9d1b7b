"""Charts as inline SVG. What is drawn are numbers; words in them are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT = 320, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 10, 24  # around the drawing
_LABEL = Markup('<text x="{}" y="{}" class="{}">{}</text>')


def loss_chart(losses: Sequence[float | None]) -> Markup:
    """Return the curve of a search's losses, on a logarithmic scale where all are above 0.

    "" where fewer than two are known.
    """
    known = [loss for loss in losses if loss is not None]
    if len(known) < 2:
        return Markup("")
    logarithmic = min(known) > 0
    values = [
        None if loss is None else (math.log10(loss) if logarithmic else loss) for loss in losses
    ]
    low, high = _range([value for value in values if value is not None])
    points = [
        (_across(i, len(values)), _up(value, low, high))
        for i, value in enumerate(values)
        if value is not None
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    ticks = [(low, _tick(low, logarithmic)), (high, _tick(high, logarithmic))]
    body = _axis(ticks, low, high) + Markup('<polyline class="line" points="{}"/>').format(line)
    body += _LABEL.format(_LEFT, _HEIGHT - 6, "tick", "start")
    body += _LABEL.format(_WIDTH - _RIGHT, _HEIGHT - 6, "tick end", "end of the search")
    what = f"Matching loss from {known[0]:.3g} at first to {known[-1]:.3g} at last"
    return _svg(body, what)


def step_chart(psnr: Sequence[float | None], mean_colour: float | None) -> Markup:
    """Return the mean PSNR of each local step's images as bars, beside the mean colour.

    "" where fewer than two are known.

    Parameters
    ----------
    psnr : sequence of (float or None)
        In dB; None where a step trains on no new image.
    mean_colour : float or None
        In dB.
    """
    known = [value for value in psnr if value is not None]
    if len(known) < 2:
        return Markup("")
    high = max(10.0, *known, mean_colour or 0.0)
    room = (_WIDTH - _LEFT - _RIGHT) / len(psnr)
    body = _axis([(0.0, "0"), (high, f"{high:.0f} dB")], 0.0, high)
    for i, value in enumerate(psnr):
        if value is None:
            continue
        top = _up(max(0.0, value), 0.0, high)
        left, height = _LEFT + room * (i + 0.15), _HEIGHT - _BOTTOM - top
        body += Markup(
            '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
        ).format(left, top, room * 0.7, height)
    if mean_colour is not None:
        y = _up(max(0.0, mean_colour), 0.0, high)
        body += Markup('<line class="base" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            _LEFT, _WIDTH - _RIGHT, y, y
        )
        body += _LABEL.format(_WIDTH - _RIGHT, f"{y - 3:.1f}", "tick end", "mean colour")
    body += _LABEL.format(_LEFT, _HEIGHT - 6, "tick", "local step 1")
    body += _LABEL.format(_WIDTH - _RIGHT, _HEIGHT - 6, "tick end", f"step {len(psnr)}")
    values = ", ".join("none" if value is None else f"{value:.1f}" for value in psnr[:50])
    return _svg(body, f"PSNR in dB by local step: {values}")


def _svg(body: Markup, what: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, what, body
    )


def _axis(ticks: Sequence[tuple[float, str]], low: float, high: float) -> Markup:
    """Return lines across the drawing, each with its number at the left."""
    found = Markup("")
    for value, words in ticks:
        y = _up(value, low, high)
        found += Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            _LEFT, _WIDTH - _RIGHT, y, y
        )
        found += _LABEL.format(_LEFT - 5, f"{y + 4:.1f}", "tick end", words)
    return found


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * max(1.0, abs(high)) else (low - 0.5, high + 0.5)


def _tick(value: float, logarithmic: bool) -> str:
    return f"{10**value if logarithmic else value:.2g}"


def _across(place: int, count: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * place / max(1, count - 1)


def _up(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low)
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

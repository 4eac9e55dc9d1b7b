"""Leakage against accuracy, drawn as SVG: for the report, and as a file. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fl_app.runs.advice import AS_IT_IS, Advice, as_it_is

_WIDTH, _HEIGHT = 380, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 26, 38  # around the drawing
_INK, _SOFT, _LINE = "#17212b", "#4d5b68", "#d5dce3"
_NOW, _OTHER, _HALVES = "#9a1b14", "#14507f", "#e6f2ea"
_DOT = 4.0
_TALL, _LETTER = 7.5, 3.4  # half the height of a label, half the width of a letter in it
_FAR = range(13, 120, 7)  # where a label is tried, from its dot
_TURNS = 16
_BAND_WORDS = 110  # width of what is written in the band
_KEY = 33  # height of a change's two lines in the file's key

_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" font-size="12" fill="{}" text-anchor="{}"{}>{}</text>')
_BOLD = Markup(' font-weight="bold"')

_Point = tuple[float, float]
_Box = tuple[float, float, float, float]  # left, top, right, bottom


def advice_chart(rows: Sequence[Advice]) -> Markup:
    """Return what leaks against accuracy: a numbered point a change; "" if it can't be drawn.

    That needs two changes or more whose accuracy was measured. The numbers are the rows' places,
    from 1. Changes that reached the same share a point. Those in the tinted band at least halve
    what leaks as it is.
    """
    drawing = _drawing(rows)
    return _svg(rows, drawing, _HEIGHT, Markup("")) if drawing else Markup("")


def advice_file(rows: Sequence[Advice]) -> Markup:
    """Return the same drawing as an SVG file, with a key to its numbers; "" if there is none."""
    drawing = _drawing(rows)
    if not drawing:
        return Markup("")
    y = _HEIGHT + 12.0
    for number, row in _measured(rows):
        drawing += _text(22, y, number, "end", bold=True) + _text(30, y, row.change)
        drawing += _text(30, y + 14, _found(row), ink=_SOFT)
        y += _KEY
    white = Markup('<rect width="{}" height="{:.0f}" fill="#fff"/>').format(_WIDTH, y)
    return _svg(rows, white + drawing, y, Markup(' xmlns="http://www.w3.org/2000/svg"'))


def _svg(rows: Sequence[Advice], drawing: Markup, height: float, more: Markup) -> Markup:
    points = "; ".join(f"{n} {row.change}: {_found(row)}" for n, row in _measured(rows))
    return Markup(
        '<svg{} viewBox="0 0 {} {:.0f}" class="wide" font-family="sans-serif" role="img" '
        'aria-labelledby="advice-title advice-desc"><title id="advice-title">What leaks against '
        'accuracy, by change</title><desc id="advice-desc">{}</desc>{}</svg>'
    ).format(more, _WIDTH, height, points, drawing)


def _measured(rows: Sequence[Advice]) -> list[tuple[int, Advice]]:
    """Return the rows that have a place in the drawing, with their numbers."""
    return [(n, row) for n, row in enumerate(rows, 1) if row.of and row.accuracy is not None]


def _is_now(row: Advice) -> bool:
    return row.change == AS_IT_IS


def _found(row: Advice) -> str:
    return f"{row.leaked} of {row.of} {row.by}, accuracy {row.accuracy:.1%}"


def _drawing(rows: Sequence[Advice]) -> Markup:
    measured = _measured(rows)
    if len(measured) < 2:
        return Markup("")
    low, high = _bounds([row.accuracy or 0.0 for _, row in measured])
    half = _half(rows)
    found = (Markup("") if half is None else _band(half)) + _axes(rows, low, high)
    dots = [(_across(row.accuracy or 0.0, low, high), _up(row)) for _, row in measured]
    spots = _spots(measured, dots)
    labels = Markup("")  # over the lines
    for spot, (x, y) in zip(spots, _beside(spots, half), strict=True):
        now = any(map(_is_now, spot.rows))
        ink, (wide, tall) = _NOW if now else _OTHER, spot.half
        found += Markup(
            '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}" stroke-width="0.7"/>'
        ).format(*spot.at, x, y, ink)
        for row, dot in sorted(zip(spot.rows, spot.dots, strict=True), key=lambda p: _is_now(p[0])):
            found += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}"/>').format(
                *dot, _DOT, _NOW if _is_now(row) else _OTHER
            )
        labels += Markup(
            '<g><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
            'rx="3" fill="#fff" stroke="{}"/>{}</g>'
        ).format(
            "; ".join(f"{row.change}: {_found(row)}" for row in spot.rows),
            x - wide, y - tall, 2 * wide, 2 * tall, ink,
            _text(x, y + 4, spot.label, "middle", ink, now),
        )  # fmt: skip
    return found + labels


@dataclass(frozen=True)
class _Spot:
    """One change, or several whose dots touch: they share a label."""

    numbers: tuple[int, ...]
    rows: tuple[Advice, ...]
    dots: tuple[_Point, ...]

    @property
    def at(self) -> _Point:
        """Where the line from the label ends."""
        return self.dots[0]

    @property
    def label(self) -> str:
        return ", ".join(map(str, self.numbers))

    @property
    def half(self) -> _Point:
        """Half the width and half the height of the label's frame."""
        return 4 + _LETTER * len(self.label), _TALL


def _spots(measured: Sequence[tuple[int, Advice]], dots: Sequence[_Point]) -> list[_Spot]:
    found: list[_Spot] = []
    for (number, row), dot in zip(measured, dots, strict=True):
        near = (spot for spot in found if any(math.dist(dot, d) < 2 * _DOT for d in spot.dots))
        if spot := next(near, None):
            found[found.index(spot)] = _Spot(
                (*spot.numbers, number), (*spot.rows, row), (*spot.dots, dot)
            )
        else:
            found.append(_Spot((number,), (row,), (dot,)))
    return found


def _half(rows: Sequence[Advice]) -> float | None:
    """Return the height of half the leakage as it is; None where that is not known, or none."""
    now = as_it_is(rows)
    return (_up(now) + _HEIGHT - _BOTTOM) / 2 if now and now.leaked else None


def _band(half: float) -> Markup:
    """Return the band of what at least halves the leakage as it is."""
    bottom = _HEIGHT - _BOTTOM
    band = Markup('<rect x="{}" y="{:.1f}" width="{}" height="{:.1f}" fill="{}"/>').format(
        _LEFT, half, _WIDTH - _LEFT - _RIGHT, bottom - half, _HALVES
    )
    return band + _text(_LEFT + 4, half + 13, "halves what leaks", ink=_SOFT)


def _axes(rows: Sequence[Advice], low: float, high: float) -> Markup:
    found, bottom = Markup(""), _HEIGHT - _BOTTOM
    rule = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}"/>')
    for share in (0, 25, 50, 75, 100):
        y = _height(share / 100)
        found += rule.format(_LEFT, _WIDTH - _RIGHT, y, y, _LINE)
        found += _text(_LEFT - 6, y + 4, f"{share}%", "end", _SOFT)
    for tick in _ticks(low, high):
        x = _across(tick, low, high)
        found += rule.format(x, x, bottom, bottom + 4, _SOFT)
        found += _text(x, bottom + 16, f"{100 * tick:g}%", "middle", _SOFT)
    by = next(row.by for row in rows if row.of)
    found += _text(_LEFT, _TOP - 12, f"images {by}", ink=_SOFT)
    return found + _text(_WIDTH - _RIGHT, bottom + 33, "accuracy of the model", "end", _SOFT)


def _text(
    x: float, y: float, words: object, anchor: str = "start", ink: str = _INK, bold: bool = False
) -> Markup:
    return _TEXT.format(x, y, ink, anchor, _BOLD if bold else "", words)


def _across(accuracy: float, low: float, high: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (accuracy - low) / (high - low)


def _height(share: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)


def _up(row: Advice) -> float:
    return _height(row.leaked / row.of)


def _bounds(accuracies: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis, with room for the numbers beside the outermost points."""
    low, high = min(accuracies), max(accuracies)
    room = max(0.01, 0.12 * (high - low))
    return max(0.0, low - room), min(1.0, high + room)


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield round shares between two: at most six."""
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 6)
    yield from (i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1))


def _beside(spots: Sequence[_Spot], half: float | None) -> list[_Point]:
    """Return where each spot's label stands: near it, on no other words or dot, and on no line.

    In a crowd lines cross.
    """
    full = [_around(dot, (_DOT, _DOT)) for spot in spots for dot in spot.dots]
    if half is not None:
        full.append((_LEFT, half, _LEFT + _BAND_WORDS, half + 2 * _TALL))
    lines: list[_Box] = []
    found: list[_Point] = []
    for spot in spots:
        free = [each for each in _near(spot) if _is_free([_around(each, spot.half)], full)]
        clear = (
            each
            for each in free
            if _is_free([_around(each, spot.half)], lines)
            and _is_free(_line(each, spot.at), full + lines)
        )
        found.append(next(clear, free[0] if free else spot.at))
        full.append(_around(found[-1], spot.half))
        lines += _line(found[-1], spot.at)
    return found


def _near(spot: _Spot) -> Iterator[_Point]:
    """Yield places around a spot within the drawing, the nearest first."""
    wide, tall = spot.half
    for far in _FAR:
        for turn in range(_TURNS):
            angle = math.pi * (1 / 4 + 2 * turn / _TURNS)  # first above it, to the right
            # A wide label stands beside its dot, not on it.
            x = spot.at[0] + (far + wide - _TALL) * math.cos(angle)
            y = spot.at[1] - far * math.sin(angle)
            across, down = _LEFT + wide < x < _WIDTH - wide, tall < y < _HEIGHT - _BOTTOM - tall
            if across and down:
                yield x, y


def _is_free(boxes: Sequence[_Box], full: Sequence[_Box]) -> bool:
    return not any(_overlap(one, other) for one in boxes for other in full)


def _line(place: _Point, dot: _Point) -> list[_Box]:
    """Return boxes along the line from a number to its dot, but for the dot's own place."""
    length = max(math.dist(place, dot), 1.0)
    steps = range(2 * math.ceil(_DOT), math.ceil(length), 5)
    right, down = ((p - d) / length for p, d in zip(place, dot, strict=True))
    return [_around((dot[0] + s * right, dot[1] + s * down), (0.5, 0.5)) for s in steps]


def _around(middle: _Point, half: _Point) -> _Box:
    (x, y), (wide, tall) = middle, half
    return x - wide, y - tall, x + wide, y + tall


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

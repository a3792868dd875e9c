"""Plots as SVG text: points and lines over two axes, no dependency, nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6e4f", "#b5446e", "#3066be", "#e08e45", "#6b4e9b", "#4a4a4a")

Points = Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Series:
    """Points drawn in one colour.

    Attributes:
        name: In the legend.
        points: (x, y, what a hover says).
        colour: Of dots and line.
        line: Join the points. dashed: Of the line.
        marker: dot, ring, cross or none.
    """

    name: str
    points: Points
    colour: str
    line: bool = False
    dashed: bool = False
    marker: str = "dot"


@dataclass(frozen=True)
class Frame:
    """The drawing's sizes in user units; the legend stands in the right margin."""

    width: int = 860
    height: int = 560
    left: int = 70
    right: int = 250
    top: int = 44
    bottom: int = 60


_Place = Callable[[float, float], tuple[float, float]]


def svg(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    floor: float = -math.inf,
    frame: Frame | None = None,
) -> str:
    """Draws the series.

    Args:
        series: In drawing order; points that are not finite are left out.
        title: Above the plot.
        x_label: Below it.
        y_label: Beside it.
        floor: Points with a lower y are left out.
        frame: Sizes.

    Returns:
        An ``<svg>`` element.
    """
    frame = frame or Frame()
    series = [_visible(one, floor) for one in series]
    xs = [x for one in series for x, _, _ in one.points]
    ys = [y for one in series for _, y, _ in one.points]
    x_range, y_range = _padded(xs), _padded(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return (
            round(frame.left + across * (frame.width - frame.left - frame.right), 1),
            round(frame.height - frame.bottom - up * (frame.height - frame.top - frame.bottom), 1),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {frame.height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{frame.width}" height="{frame.height}" fill="white"/>',
        f'<text x="{frame.left}" y="24" font-size="15">{escape(title)}</text>',
        *_grid(place, x_range, y_range),
        *_labels(frame, x_label, y_label),
    ]
    for row, one in enumerate(series):
        parts += [*_draw(one, place), *_legend(one, row, frame)]
    return "\n".join([*parts, "</svg>\n"])


def _visible(one: Series, floor: float) -> Series:
    kept = [p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1]) and p[1] >= floor]
    return Series(one.name, kept, one.colour, one.line, one.dashed, one.marker)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, 3 % wider on both sides, never empty."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = 0.03 * (high - low) or 0.03 * abs(high) or 0.5
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Round values in a range, at most nine."""
    power = 10.0 ** math.floor(math.log10((high - low) / 9))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(math.ceil(low / step), int(high // step) + 1)]


def _grid(place: _Place, x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    parts = []
    for value in _ticks(*x_range):
        (x, low), (_, high) = place(value, y_range[0]), place(value, y_range[1])
        parts.append(f'<line x1="{x}" y1="{high}" x2="{x}" y2="{low}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x}" y="{low + 18}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(*y_range):
        (left, y), (right, _) = place(x_range[0], value), place(x_range[1], value)
        parts.append(f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    return parts


def _labels(frame: Frame, x_label: str, y_label: str) -> list[str]:
    across = (frame.left + frame.width - frame.right) / 2
    down = (frame.top + frame.height - frame.bottom) / 2
    return [
        f'<text x="{across}" y="{frame.height - 16}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {down}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _draw(one: Series, place: _Place) -> list[str]:
    spots = [(*place(x, y), note) for x, y, note in one.points]
    parts = []
    if one.line and spots:
        path = " ".join(f"{x},{y}" for x, y, _ in spots)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2"'
            f"{_dash(one)}/>"
        )
    return parts + [_marker(one, x, y, note) for x, y, note in spots if one.marker != "none"]


def _dash(one: Series) -> str:
    return ' stroke-dasharray="5 4"' if one.dashed else ""


def _marker(one: Series, x: float, y: float, note: str = "") -> str:
    tip = f"<title>{escape(note)}</title>" if note else ""
    if one.marker == "cross":
        return (
            f'<path d="M{x - 5} {y - 5}L{x + 5} {y + 5}M{x - 5} {y + 5}L{x + 5} {y - 5}" '
            f'stroke="{one.colour}" stroke-width="2.5">{tip}</path>'
        )
    if one.marker == "ring":
        look = f'r="3" fill="none" stroke="{one.colour}" pointer-events="all"'
    else:
        look = f'r="4" fill="{one.colour}"'
    return f'<circle cx="{x}" cy="{y}" {look}>{tip}</circle>'


def _legend(one: Series, row: int, frame: Frame) -> list[str]:
    x, y = frame.width - frame.right + 24, frame.top + 12 + 22 * row
    parts = [] if one.marker == "none" else [_marker(one, x, y)]
    if one.line:
        parts.append(
            f'<line x1="{x - 12}" y1="{y}" x2="{x + 12}" y2="{y}" stroke="{one.colour}" '
            f'stroke-width="2"{_dash(one)}/>'
        )
    return [*parts, f'<text x="{x + 20}" y="{y + 4}">{escape(one.name)}</text>']

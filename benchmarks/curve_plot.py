"""One self-contained SVG: accuracy against entropy, static settings and heads over their dial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 44, 60
COLOURS = ("#0b6e4f", "#b5446e", "#3066be", "#e08e45", "#6b4e9b", "#4a4a4a")

Points = Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Series:
    """Points (entropy, accuracy, what a hover says), dots or a line with dots."""

    name: str
    points: Points
    colour: str
    line: bool = False
    dashed: bool = False
    marker: str = "dot"


def svg(series: Sequence[Series], title: str, floor: float = 0.0) -> str:
    """Draw the series.

    Args:
        series: What to draw, in order.
        title: Stands above the plot.
        floor: Points of lower accuracy are left out (the axis begins near it).
    """
    shown = [(x, y) for s in series for x, y, _ in s.points if y >= floor]
    high_x = max(x for x, _ in shown) * 1.03 or 1.0
    low_y, high_y = max(0.0, min(y for _, y in shown) - 0.02), min(1.0, max(y for _, y in shown))
    high_y += 0.01

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / high_x * (WIDTH - LEFT - RIGHT)
        down = TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        *_axes(place, high_x, low_y, high_y),
    ]
    for row, one in enumerate(series):
        parts += _draw(one, place, floor)
        parts += _legend(one, row)
    return "\n".join([*parts, "</svg>\n"])


def _axes(place: object, high_x: float, low_y: float, high_y: float) -> list[str]:
    assert callable(place)
    parts = []
    for value in _ticks(0.0, high_x):
        x, y = place(value, low_y)
        parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(low_y, high_y):
        x, y = place(0.0, value)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{value:.2f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">'
        "entropy of the distribution sampled from, nats an answer</text>"
    )
    parts.append(
        f'<text transform="translate(20 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        'text-anchor="middle">accuracy</text>'
    )
    return parts


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 1, 2, 5, 10, 20, 50) if high - low < 9 * s)
    first = int(low / step + 0.999)
    return [round(i * step, 4) for i in range(first, int(high / step) + 1)]


def _draw(one: Series, place: object, floor: float) -> list[str]:
    assert callable(place)
    spots = [(*place(x, y), note) for x, y, note in one.points if y >= floor]
    parts = []
    if one.line:
        path = " ".join(f"{x},{y}" for x, y, _ in spots)
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2"{dash}/>'
        )
    for x, y, note in spots:
        parts.append(f"{_marker(one, x, y)}<title>{escape(note)}</title></{_tag(one)}>")
    return parts


def _tag(one: Series) -> str:
    return "path" if one.marker == "cross" else "circle"


def _marker(one: Series, x: float, y: float) -> str:
    if one.marker == "cross":
        return (
            f'<path d="M{x - 5} {y - 5}L{x + 5} {y + 5}M{x - 5} {y + 5}L{x + 5} {y - 5}" '
            f'stroke="{one.colour}" stroke-width="2.5">'
        )
    if one.marker == "ring":
        return f'<circle cx="{x}" cy="{y}" r="2.5" fill="none" stroke="{one.colour}">'
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{one.colour}">'


def _legend(one: Series, row: int) -> list[str]:
    x, y = WIDTH - RIGHT + 24, TOP + 12 + 22 * row
    parts = [f"{_marker(one, x, y)}</{_tag(one)}>"]
    if one.line:
        parts.append(
            f'<line x1="{x - 12}" y1="{y}" x2="{x + 12}" y2="{y}" stroke="{one.colour}"'
            f"{' stroke-dasharray=' + chr(34) + '5 4' + chr(34) if one.dashed else ''}/>"
        )
    return [*parts, f'<text x="{x + 20}" y="{y + 4}">{escape(one.name)}</text>']

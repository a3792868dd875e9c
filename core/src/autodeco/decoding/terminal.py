"""Tokens in the terminal, each coloured by the T and P that it was sampled with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.color import Color
from rich.style import Style
from rich.text import Text

# T = 0, 1, 2: forced is blue, the model's own distribution is grey, free is red.
_COLD, _NEUTRAL, _HOT = (66, 135, 245), (190, 190, 190), (240, 75, 60)
_OPEN, _CUT = (18, 18, 18), (88, 88, 88)


Rgb = tuple[int, int, int]


def _mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    r, g, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, blue


def token_rgb(temperature: float, top_p: float) -> tuple[Rgb, Rgb]:
    """The colours of a token, of its letters and of the ground, 0-255 each.

    Args:
        temperature: T; the letters go from blue (0) over grey (1) to red (2 and more).
        top_p: P; the ground goes from near black (1: nothing cut) to grey (0: one token left).
    """
    t = min(max(temperature, 0.0), 2.0)
    ink = _mix(_COLD, _NEUTRAL, t) if t <= 1 else _mix(_NEUTRAL, _HOT, t - 1)
    return ink, _mix(_OPEN, _CUT, 1 - min(max(top_p, 0.0), 1.0))


def token_style(temperature: float, top_p: float) -> Style:
    """`token_rgb` as a style of rich."""
    ink, ground = token_rgb(temperature, top_p)
    return Style(color=Color.from_rgb(*ink), bgcolor=Color.from_rgb(*ground))


def coloured_tokens(
    tokens: Sequence[str], temperature: Sequence[float], top_p: Sequence[float]
) -> Text:
    """The tokens' text, one after the other, each in its `token_style`.

    Control characters other than a line break or a tab are shown as a replacement character, so
    that no model output can send commands to the terminal.

    Raises:
        ValueError: the three are of different lengths.
    """
    text = Text()
    for token, t, p in zip(tokens, temperature, top_p, strict=True):
        shown = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in token)
        text.append(shown, token_style(t, p))
    return text


def legend() -> Text:
    """One line that says what the colours mean."""
    text = Text("T ")
    for t in (0.0, 0.5, 1.0, 1.5, 2.0):
        text.append(f" {t:g} ", token_style(t, 1.0))
    text.append("   P ")
    for p in (1.0, 0.75, 0.5, 0.25, 0.0):
        text.append(f" {p:g} ", token_style(1.0, p))
    return text

"""The layouts of two processes that a plugin's random presets are computed at."""

from __future__ import annotations

from dataclasses import replace

from autodeco.layout import ParallelLayout

LAYOUTS = ("tp=2", "pp=2", "ep=2")
RANKS = 2


def for_layers(text: str, layers: int) -> ParallelLayout:
    """Returns a layout; the first of two stages gets the layer that is left over."""
    layout = ParallelLayout.parse(text)
    uneven = layout.pipeline == RANKS and layers % RANKS and not layout.first_stage_layers
    return replace(layout, first_stage_layers=layers - layers // RANKS) if uneven else layout

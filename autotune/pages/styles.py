"""What tells studies apart in one picture: colour, marker and dash, no two alike in marker and dash."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.report import COLORS

__all__ = ["MOST", "Style", "style"]

SYMBOLS = {
    "circle": "M17 2a5 5 0 1 0 .01 0z",
    "square": "M12.5 2.5h9v9h-9z",
    "triangle-up": "M17 1.5l5.5 10h-11z",
    "cross": "M15 2h4v3h3v4h-3v3h-4V9h-3V5h3z",
    "triangle-down": "M17 12.5l5.5-10h-11z",
    "pentagon": "M17 1.5l5.5 4-2 6.5h-7l-2-6.5z",
    "x": "M13.5 2l3.5 3.3L20.5 2 22 3.5 18.7 7 22 10.5 20.5 12 17 8.7 13.5 12 12 10.5 15.3 7 12 3.5z",
    "hourglass": "M12 2h10l-3.5 5L22 12H12l3.5-5z",
    "hexagon": "M17 1.5l5 2.75v5.5l-5 2.75-5-2.75v-5.5z",
    "bowtie": "M12 2v10l5-3.5 5 3.5V2l-5 3.5z",
}
"""Plotly's names, and paths about (17, 7) for a legend."""
DASHES = {
    "solid": "",
    "dash": "6 4",
    "dot": "2 3",
    "dashdot": "6 3 2 3",
    "longdash": "10 4",
    "longdashdot": "10 3 2 3",
}
"""Plotly's names, and SVG's."""
MOST = 30
"""Studies in one picture: beyond, two would look alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    color: str
    symbol: str
    dash: str

    @property
    def path(self) -> str:
        return SYMBOLS[self.symbol]

    @property
    def strokes(self) -> str:
        return DASHES[self.dash]


def style(place: int) -> Style:
    """Of the study at a place, less than `MOST`."""
    color, symbol, dash = COLORS[place % len(COLORS)], [*SYMBOLS][place % len(SYMBOLS)], [*DASHES][place % len(DASHES)]
    return Style(color=color, symbol=symbol, dash=dash)

"""How numbers stand on a page, and scales that they are drawn by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

__all__ = ["NOT_KNOWN", "Axis", "Range", "axis", "moment", "percent", "range_of"]

MINUS = "−"
NOT_KNOWN = "–"
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
MOST_TICKS = 6


@dataclass(frozen=True, slots=True)
class Range:
    """A value and where it lies with 95 %; low and high are None where nobody has worked that out."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, spec: str = ".3f") -> str:
        """ "0.912 [0.900, 0.923]", each number by the format."""
        told = f"{self.value:{spec}}"
        if self.low is not None and self.high is not None:
            told += f" [{self.low:{spec}}, {self.high:{spec}}]"
        return told.replace("-", MINUS)

    def times(self, factor: float) -> Range:
        low, high = (None if end is None else factor * end for end in (self.low, self.high))
        return Range(factor * self.value, low, high)

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high, or the value twice."""
        low = self.value if self.low is None else self.low
        return low, self.value if self.high is None else self.high


def range_of(told: Any) -> Range | None:
    """Of what evidence says: an object with value, low and high, or a number; None for anything else."""
    if isinstance(told, Mapping):
        parts = [told.get(key) for key in ("value", "low", "high")]
        value, *ends = [float(part) if isinstance(part, int | float) else None for part in parts]
        return None if value is None else Range(value, *ends)
    return Range(float(told)) if isinstance(told, int | float) and not isinstance(told, bool) else None


@dataclass(frozen=True, slots=True)
class Axis:
    """From `first` to `last` in the drawing's units. ticks: each a value and its place."""

    low: float
    high: float
    first: float
    last: float
    ticks: tuple[tuple[float, float], ...]

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def axis(values: Iterable[float], first: float, last: float) -> Axis:
    """One that all values fit on, with room at both ends and ticks at round numbers."""
    there = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(there), max(there)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low - room, high + room
    plain = Axis(low, high, first, last, ())
    step = _step((high - low) / MOST_TICKS)
    begin = math.ceil(low / step - 1e-9)
    ticks = [round(index * step, 10) for index in range(begin, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, first, last, tuple((tick + 0.0, plain.at(tick)) for tick in ticks))


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in STEPS if step * power >= least * (1 - 1e-9))


def percent(share: float | None, spec: str = ".1f") -> str:
    return NOT_KNOWN if share is None else f"{100 * share:{spec}} %".replace("-", MINUS)


def moment(seconds: float) -> str:
    """A time since 1970, as it is read, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")

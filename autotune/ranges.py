"""What a searched setting may be: a range that never changes, so that any sampler can learn from every draw."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.config import AutotuneError

__all__ = ["Choice", "Draw", "Float", "Int", "Range", "constant", "random_draw"]

Draw = Mapping[str, int | float | str | bool]


@dataclass(frozen=True, slots=True)
class Int:
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not (type(self.low) is type(self.high) is int and self.low <= self.high):
            raise AutotuneError(f"must be two rising whole numbers [low, high], got [{self.low}, {self.high}]")

    @property
    def is_constant(self) -> bool:
        return self.low == self.high

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    def at(self, share: float) -> int:
        return min(self.low + int(share * (self.high - self.low + 1)), self.high)

    def nearest(self, value: Any) -> int:
        return max(self.low, min(int(value), self.high))


@dataclass(frozen=True, slots=True)
class Float:
    """Numbers from low to high, both included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (self.low, self.high))
        if not numbers or self.low > self.high:
            raise AutotuneError(f"must be two rising numbers [low, high], got [{self.low}, {self.high}]")

    @property
    def is_constant(self) -> bool:
        return self.low == self.high

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def at(self, share: float) -> float:
        return self.low + share * (self.high - self.low)

    def nearest(self, value: Any) -> float:
        return float(max(self.low, min(value, self.high)))


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some options, which have no order."""

    options: tuple[int | float | str | bool, ...]

    def __post_init__(self) -> None:
        if not self.options or len(set(self.options)) < len(self.options):
            raise AutotuneError(f"must be one or more options, each once, got {list(self.options)}")

    @property
    def is_constant(self) -> bool:
        return len(self.options) == 1

    @property
    def middle(self) -> int | float | str | bool:
        return self.options[0]

    def at(self, share: float) -> int | float | str | bool:
        return self.options[min(int(share * len(self.options)), len(self.options) - 1)]

    def nearest(self, value: Any) -> int | float | str | bool:
        return value if value in self.options else self.options[0]


Range = Int | Float | Choice


def constant(value: int | float | str | bool) -> Choice:
    """The one value there is."""
    return Choice((value,))


def random_draw(ranges: Mapping[str, Range], rng: random.Random) -> dict[str, int | float | str | bool]:
    """Each setting by itself, all values alike; the same draws from the same generator."""
    return {name: setting.at(rng.random()) for name, setting in ranges.items()}

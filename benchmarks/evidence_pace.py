"""How far the evidence is, and about how long the rest will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

__all__ = ["SECONDS", "Pace"]

SECONDS = {"probe": 3.0, "system": 18.0, "trial": 5.0, "learned": 260.0, "row": 12.0, "crossing": 2.5, "depth": 2.0}
"""A step on two cores, for the reference VLM: what the time left is guessed by until steps have been timed."""


class Pace:
    """Says what was done and about how long the rest will take."""

    def __init__(self, planned: Counter[str], print_line: Callable[[str], None], speed: float = 1.0) -> None:
        self._left, self._print, self._speed = Counter(planned), print_line, speed
        self._began = self._last = time.monotonic()
        self._took = self._guessed = 0.0
        self._print(f"about {self.seconds_left / 60:.0f} min on two quiet cores, unless it was begun before")

    def __call__(self, kind: str, what: str) -> None:
        """A step of this kind is done."""
        took, self._last = time.monotonic() - self._last, time.monotonic()
        if self._left[kind]:
            self._left[kind] -= 1
            if took > 0.1 * self._speed * SECONDS[kind]:  # else it was kept from an earlier run
                self._took, self._guessed = self._took + took, self._guessed + SECONDS[kind]
        minutes = (time.monotonic() - self._began) / 60
        self._print(f"[{minutes:5.1f} min, about {self.seconds_left / 60:.0f} left] {what}")

    @property
    def seconds_left(self) -> float:
        speed = self._took / self._guessed if self._guessed else self._speed
        return speed * sum(SECONDS[kind] * count for kind, count in self._left.items())

"""What several fronts attain: of searches that differ in seed alone, how good a front is to be expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np

from autotune.pages.fronts import Place, coordinates

__all__ = ["Attained", "attained", "levels"]

QUARTILES_FROM = 4  # fronts; of fewer, the best and the worst are told


@dataclass(frozen=True, slots=True)
class Attained:
    """What half of several fronts attain: y from an x on, and what most and few attain there.

    y_few: the best one's, or from four fronts on what a quarter attain; y_most: the worst one's, or what three quarters
    attain. None where so many attain nothing.
    """

    x: float
    y: float
    y_few: float | None
    y_most: float | None


def attained(fronts: Sequence[Sequence[Place]]) -> list[Attained]:
    """The median attainment surface of several fronts, a step each; a front with no member counts."""
    few, half, most = levels(len(fronts))
    steps = _surfaces([front for front in fronts if front])
    return [Attained(x, y, _at(steps.get(few, []), x), _at(steps.get(most, []), x)) for x, y in steps.get(half, [])]


def levels(num_fronts: int) -> tuple[int, int, int]:
    """How many of so many fronts are few, half and most."""
    half = math.ceil(num_fronts / 2)
    if num_fronts < QUARTILES_FROM:
        return 1, half, num_fronts
    return math.ceil(num_fronts / 4), half, math.ceil(3 * num_fronts / 4)


_Step = tuple[float, float]


def _surfaces(fronts: Sequence[Sequence[Place]]) -> dict[int, list[_Step]]:
    """By how many fronts attain it: the steps (x, y), by x."""
    if not fronts:
        return {}
    sets = [number for number, members in enumerate(fronts) for _ in members]
    points = np.concatenate([coordinates(members) for members in fronts]) * (1.0, -1.0)
    found: dict[int, list[_Step]] = {}
    for x, y, percent in moocore.eaf(points, sets).tolist():
        found.setdefault(round(percent * len(fronts) / 100), []).append((x, -y))
    return {level: sorted(steps) for level, steps in found.items()}


def _at(steps: Sequence[_Step], x: float) -> float | None:
    return max((y for at, y in steps if at <= x), default=None)

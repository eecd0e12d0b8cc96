"""A search space whose every setting has a few levels, so that all of its plans can be scored once and looked up."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autotune.latency_model import LatencyModel
from autotune.ranges import Choice, Draw, Float, Int, Range
from autotune.realised import realised_key
from autotune.space import SearchSpace
from btp.plan import Plan

__all__ = ["GRID", "LIMIT", "Grid", "digest_of"]

Level = int | float | str | bool
LIMIT = 0.35
"""Of dense's multiply-accumulates: so many are left to plans that take half of dense's time on the reference VLM."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The levels of every setting that draws of `space` have; one with a single level is no part of a cell."""

    space: SearchSpace
    levels: Mapping[str, tuple[Level, ...]]

    def __post_init__(self) -> None:
        if unlike := sorted(self.levels.keys() ^ self.space.ranges.keys()):
            raise ValueError(f"levels must be given for exactly the settings of the space, not so: {', '.join(unlike)}")

    @property
    def free(self) -> dict[str, tuple[Level, ...]]:
        """The settings with several levels, in the space's order."""
        return {name: self.levels[name] for name in self.space.ranges if len(self.levels[name]) > 1}

    @property
    def ranges(self) -> dict[str, Range]:
        """What a sampler draws: the options themselves, and numbers by their level's index, lowest first."""
        return {name: _range(levels) for name, levels in self.free.items()}

    def restricted(self, **fixed: Level) -> Grid:
        """The cells that have these values. Raises ValueError for a value that is no level."""
        if unknown := [name for name, value in fixed.items() if value not in self.levels.get(name, ())]:
            raise ValueError(f"a grid is restricted to levels that it has, not so: {', '.join(unknown)}")
        return Grid(space=self.space, levels={**self.levels, **{name: (value,) for name, value in fixed.items()}})

    def cells(self) -> Iterator[Draw]:
        """Every cell as a draw of `space`, the last setting's levels changing fastest."""
        names = list(self.space.ranges)
        for values in itertools.product(*(self.levels[name] for name in names)):
            yield dict(zip(names, values, strict=True))

    def cell(self, drawn: Draw) -> Draw:
        """The draw of `space` that a draw from `ranges` stands for."""
        return {name: _value(levels, drawn[name]) if len(levels) > 1 else levels[0] for name, levels in self._ordered()}

    def index(self, cell: Draw) -> int:
        """The cell's place in the order of `cells`."""
        found = 0
        for name, levels in self._ordered():
            found = found * len(levels) + levels.index(cell[name])
        return found

    def plan(self, cell: Draw, latency: LatencyModel) -> Plan:
        """The cell's plan: its schedule, as long as its share of `LIMIT` allows."""
        schedule = self.space.schedule(cell, latency.counts.num_layers)
        return latency.solve(schedule, float(cell["budget"]) * LIMIT)

    def _ordered(self) -> Iterator[tuple[str, tuple[Level, ...]]]:
        return ((name, self.levels[name]) for name in self.space.ranges)


def digest_of(plan: Plan, num_layers: int, num_image_tokens: int) -> str:
    """Equal for plans that realise the same."""
    return hashlib.sha256(realised_key(plan, num_layers, num_image_tokens).encode()).hexdigest()[:16]


def _range(levels: tuple[Level, ...]) -> Range:
    return Int(0, len(levels) - 1) if _is_numeric(levels) else Choice(levels)


def _value(levels: tuple[Level, ...], drawn: Level) -> Level:
    return levels[int(drawn)] if _is_numeric(levels) else drawn


def _is_numeric(levels: tuple[Level, ...]) -> bool:
    return all(type(level) in (int, float) for level in levels)


GRID = Grid(
    space=SearchSpace(
        num_stages=Int(0, 2),
        before=Choice((False, True)),
        selectors_before=Choice(("max_sum", "k_center")),
        first_layer=Float(0.0, 0.5),
        layer_gap=Float(0.25, 0.25),
        shape=Float(0.4, 2.0),
        budget=Float(0.6, 1.0),
        selectors=Choice(("joint", "attention")),
        attention_weight=Float(0.0, 0.8),
        attention_step=Float(0.2, 0.2),
        final_drop=Choice((True,)),
        final_layer=Float(0.75, 1.25),
    ),
    levels={
        "num_stages": (0, 1, 2),
        "before": (False, True),
        "selector_before": ("max_sum", "k_center"),
        "first_layer": (0.0, 0.2, 0.5),
        "shape_0": (1.0,),
        "shape_1": (0.4, 2.0),
        "budget": (0.6, 0.8, 1.0),
        "selector": ("joint", "attention"),
        "attention_weight": (0.0, 0.4, 0.8),
        "final_layer": (0.75, 1.25),
    },
)
"""Of the reference search space: first layers 1, 2 and 4 of 8, the next one 2 further, the last drop at 6 or never."""

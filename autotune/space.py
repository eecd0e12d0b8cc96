"""Search spaces: ranges that never change, how a draw becomes a family of plans, and which draw a plan comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.config import AutotuneError
from autotune.plan_families import family, last_fall, rescale, settings_of, whole_plan
from autotune.ranges import Choice, Draw, Float, Int, Range, constant, random_draw
from autotune.realised import realised_key, realises_like, settings_read, without_idle_stages
from autotune.space_file import read_space
from btp.plan import Plan
from btp.selection import SELECTORS

__all__ = [
    "Choice",
    "Draw",
    "Float",
    "Int",
    "Range",
    "SearchSpace",
    "random_draw",
    "realised_key",
    "rescale",
]

TOLERANCE = 0.02  # of the image tokens, or one: how exactly a draw must give a plan back
BOUNDS = {
    "num_stages": (0, 8),
    "first_layer": (0, 1),
    "layer_gap": (0, 1),
    "shape": (0.01, 100),
    "budget": (0.01, 1),
    "attention_weight": (0, 1),
    "attention_step": (0, 1),
    "oversample": (1, 100),
    "seeds": (0, 1),
    "final_layer": (0, 2),
}
"""Within these every draw decodes to legal plans."""

_NEVER, _DIVERSITY, _SOFTMAX, _KEEP = (Choice((option,)) for option in (False, "diversity", "softmax", "keep"))
_ZERO, _HALF, _ONE = (Float(value, value) for value in (0.0, 0.5, 1.0))


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What is searched. Shares are of the decoder's depth, but `budget`'s, which is of the limit.

    num_stages: inside the decoder, behind layer 0; one at least where none stands before it.
    before: whether a stage stands before layer 0; it chooses by `selectors_before`, which need no attention.
    first_layer: of the layers from 1 on. layer_gap: from one stage to the next, at least one layer.
    shape: weight of a stage's reduction, in log tokens. The one before layer 0 weighs 1, or else the first inside
    where `before` is out of the question.
    attention_weight, attention_step: lambda of the first stage inside, and what each further one adds, cut at 1.
    oversample: k'/k. seeds: of the first stage inside, the other ones have none.
    free_attention_weight, free_oversample, free_selector: every stage inside draws its own.
    final_drop, final_layer: a last stage that keeps nothing; left out where it would not come after the others, and
    where its layer is beyond the last.

    A range of one value is a constant: it is no part of a draw. Nor is a setting that nothing in the space reads.
    """

    num_stages: Int
    first_layer: Float
    layer_gap: Float
    shape: Float
    budget: Float
    selectors: Choice
    before: Choice = _NEVER
    selectors_before: Choice = _DIVERSITY
    free_selector: bool = False
    attention_weight: Float = _HALF
    attention_step: Float = _ZERO
    free_attention_weight: bool = False
    attention: Choice = _SOFTMAX
    oversample: Float = _ONE
    free_oversample: bool = False
    seeds: Float = _ZERO
    final_drop: Choice = _NEVER
    final_layer: Float = _ONE
    positions: Choice = _KEEP

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            given = getattr(self, name)
            if not low <= given.low <= given.high <= high:
                raise AutotuneError(f"{name} must lie within [{low:g}, {high:g}], got [{given.low:g}, {given.high:g}]")
        for name, known in self._known_options().items():
            if unknown := [option for option in getattr(self, name).options if option not in known]:
                raise AutotuneError(f"{name} must be some of {', '.join(map(str, known))}, got {unknown}")
        if needy := [name for name in self.selectors_before.options if "attention" in settings_read(str(name))]:
            raise AutotuneError(
                f"selectors_before must do without attention, which no layer has paid yet, got {needy}; move them to "
                "selectors, or declare in btp.selection.READS what your own read"
            )

    @classmethod
    def load(cls, path: Path) -> SearchSpace:
        """The space in a YAML file. Raises AutotuneError naming the file, the key and what is known."""
        try:
            return cls(**read_space(path, cls))
        except AutotuneError as error:
            raise AutotuneError(f"{path}: {error}") from error

    @property
    def ranges(self) -> dict[str, Range]:
        """What every draw has a value for: the same names and ranges, in the same order, whatever the values."""
        return {name: setting for name, setting in self._settings().items() if not setting.is_constant}

    def schedule(self, draw: Draw, num_layers: int) -> Callable[[float], Plan]:
        """The draw's family: keep_i = exp(-t x share of the whole reduction), ever fewer tokens as t rises.

        t is the last stage's reduction in nats. From ln 32 on stages move up as well, proportionally, and at 2 ln 32
        they stand before the first layers, so that each family has plans that cost next to nothing. All plans are
        legal; a share may still round to no token, which `LatencyModel.solve` mends.
        """
        if unlike := sorted(draw.keys() ^ self.ranges.keys()):
            raise AutotuneError(f"a draw has exactly the names in `ranges`, missing or unknown: {', '.join(unlike)}")
        settings = {name: setting.middle for name, setting in self._settings().items()} | dict(draw)
        return family(whole_plan(settings, num_layers), str(settings["selector_before"]))

    def draw_of(self, plan: Plan, num_layers: int, num_image_tokens: int, budget: float) -> Draw | None:
        """The draw whose family holds this plan, where `budget` of the limit is what the plan spends.

        The family's plan has the same layers, selectors and all settings that these read, and leaves as many tokens at
        every stage but for 2 % of all, or one. None where the space cannot say that, or has no such budget.
        """
        if any(stage.layer >= num_layers for stage in plan.stages):
            return None
        tolerance = max(1, int(TOLERANCE * num_image_tokens))
        working = tuple(stage for stage, _ in without_idle_stages(plan, num_layers, num_image_tokens))
        middle_shape = math.sqrt(self.shape.low * self.shape.high) if True in self.before.options else None
        for stages in dict.fromkeys((plan.stages, working)):
            settings = settings_of(replace(plan, stages=stages), num_layers, middle_shape)
            draw = self._nearest(settings | {"budget": budget})
            got = self.schedule(draw, num_layers)(last_fall(stages))
            told = realises_like(plan, got, num_layers, num_image_tokens, tolerance)
            if told and math.isclose(self.budget.nearest(budget), budget, abs_tol=1e-9):
                return draw
        return None

    def _nearest(self, wanted: dict[str, Any]) -> dict[str, int | float | str | bool]:
        """The draw that comes nearest to these settings; the middle of a range where there is none."""
        return {
            name: setting.nearest(wanted[name]) if name in wanted else setting.middle
            for name, setting in self.ranges.items()
        }

    def _known_options(self) -> dict[str, tuple[str | bool, ...]]:
        names = tuple(sorted(SELECTORS))
        known: dict[str, tuple[str | bool, ...]] = {"selectors": names, "selectors_before": names}
        known |= {"before": (False, True), "final_drop": (False, True)}
        return known | {"attention": ("softmax", "logits"), "positions": ("keep", "reset")}

    def _settings(self) -> dict[str, Range]:
        """All settings by name, those that are constant or that nothing reads included: as constants."""
        num_inside = max(self.num_stages.high, int(False in self.before.options))
        inside = self.selectors.options if num_inside else ()
        read = frozenset[str]().union(*(settings_read(str(name)) for name in inside))
        found: dict[str, Range] = {"num_stages": self.num_stages, "before": self.before}
        found["selector_before"] = _if(True in self.before.options, self.selectors_before)
        found["first_layer"] = _if(num_inside > 0, self.first_layer)
        found |= {f"layer_gap_{index}": self.layer_gap for index in range(1, num_inside)}
        found |= {f"shape_{index}": self.shape for index in range(num_inside)}
        if True not in self.before.options:
            found["shape_0"] = Float(1.0, 1.0)
        found |= {"budget": self.budget}
        found |= _each("selector", self.selectors, num_inside, self.free_selector)
        weight = _if("attention_weight" in read, self.attention_weight)
        found |= _each("attention_weight", weight, num_inside, self.free_attention_weight)
        if not self.free_attention_weight:
            step = _if("attention_weight" in read, self.attention_step)
            found |= {f"attention_step_{index}": step for index in range(1, num_inside)}
        oversample = _if("oversample" in read, self.oversample)
        found |= _each("oversample", oversample, num_inside, self.free_oversample)
        found |= {"attention": _if("attention" in read, self.attention), "seeds": _if("seeds" in read, self.seeds)}
        found |= {"final_drop": self.final_drop, "positions": self.positions}
        return found | {"final_layer": _if(True in self.final_drop.options, self.final_layer)}


def _if(counts: bool, setting: Range) -> Range:
    """The setting, or a constant where it counts for nothing."""
    return setting if counts else constant(setting.middle)


def _each(name: str, setting: Range, num_stages: int, is_free: bool) -> dict[str, Range]:
    """One setting for all stages, or one for each."""
    return {f"{name}_{index}": setting for index in range(num_stages)} if is_free else {name: setting}

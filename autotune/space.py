"""Search spaces: fixed ranges read from YAML, and how a draw becomes a plan that spends a latency budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from autotune.config import AutotuneError
from btp.plan import Plan, Stage
from btp.selection import SELECTORS

__all__ = ["Draw", "SearchSpace", "rescale"]

MIN_FALL = 1e-3  # keep ratios of consecutive stages differ by at least this share
Range = tuple[float, float]
BOUNDS: dict[str, Range] = {
    "num_stages": (1, 8),
    "first_layer": (0, 1),
    "layer_gap": (0, 1),
    "shape": (0.01, 100),
    "budget": (0.01, 1),
    "attention_weight": (0, 1),
    "attention_step": (0, 1),
    "oversample": (1, 100),
}
"""Within these a draw always decodes to a legal plan."""
_KINDS = {"num_stages": "two whole numbers", "selectors": "selector names"}
Draw = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Ranges of everything that is searched; see `search_spaces/reference.yaml` for what each means."""

    num_stages: tuple[int, int]
    first_layer: Range
    layer_gap: Range
    shape: Range
    budget: Range
    attention_weight: Range
    attention_step: Range
    oversample: Range
    selectors: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, (lowest, highest) in BOUNDS.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise AutotuneError(
                    f"{name} must be a rising [low, high] within [{lowest:g}, {highest:g}], got [{low}, {high}]"
                )
        unknown = [name for name in self.selectors if name not in SELECTORS]
        if unknown or not self.selectors:
            raise AutotuneError(f"selectors must be some of {', '.join(SELECTORS)}, got {unknown or 'none'}")

    @classmethod
    def load(cls, path: Path) -> SearchSpace:
        """The space in a YAML file. Raises AutotuneError naming the file and the key."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise AutotuneError(f"a search space must be a readable YAML file, got {path}: {error}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(known):
            came = sorted(map(str, set(data) ^ set(known))) if isinstance(data, dict) else type(data).__name__
            raise AutotuneError(f"{path}: a search space has exactly {', '.join(known)}; missing or unknown: {came}")
        for name, value in data.items():
            if name == "selectors":
                legal = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
            else:
                number = int if name == "num_stages" else int | float
                legal = isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)
                legal = legal and all(isinstance(x, number) for x in value)
            if not legal:
                raise AutotuneError(
                    f"{path}: {name} must be a list of {_KINDS.get(name, 'two numbers')}, got {value!r}"
                )
        try:
            return cls(**{name: tuple(value) for name, value in data.items()})
        except AutotuneError as error:
            raise AutotuneError(f"{path}: {error}") from error

    def suggest(self, ask: Any) -> dict[str, Any]:
        """One draw through `ask.suggest_int/_float/_categorical`; always the same names and ranges."""
        draw: dict[str, Any] = {
            "num_stages": ask.suggest_int("num_stages", *self.num_stages),
            "first_layer": ask.suggest_float("first_layer", *self.first_layer),
            "budget": ask.suggest_float("budget", *self.budget),
            "attention_weight": ask.suggest_float("attention_weight", *self.attention_weight),
            "oversample": ask.suggest_float("oversample", *self.oversample),
            "selector": ask.suggest_categorical("selector", list(self.selectors)),
        }
        for stage in range(self.num_stages[1]):
            draw[f"shape_{stage}"] = ask.suggest_float(f"shape_{stage}", *self.shape)
            if stage:
                draw[f"layer_gap_{stage}"] = ask.suggest_float(f"layer_gap_{stage}", *self.layer_gap)
                draw[f"attention_step_{stage}"] = ask.suggest_float(f"attention_step_{stage}", *self.attention_step)
        return draw

    def schedule(self, draw: Draw, num_layers: int) -> Callable[[float], Plan]:
        """The draw's family of plans: keep_i = exp(-t x (shape_0 + ... + shape_i)), shorter as t rises."""
        layers = [min(int(draw["first_layer"] * num_layers), num_layers - 1)]
        weights, reduction = [draw["attention_weight"]], [draw["shape_0"]]
        for stage in range(1, draw["num_stages"]):
            layers.append(layers[-1] + max(1, round(draw[f"layer_gap_{stage}"] * num_layers)))
            weights.append(min(1.0, weights[-1] + draw[f"attention_step_{stage}"]))
            reduction.append(reduction[-1] + draw[f"shape_{stage}"])
        num_inside = sum(layer < num_layers for layer in layers)  # stages past the last layer would do nothing

        def plan(t: float) -> Plan:
            stages = [
                Stage(
                    layer=layer,
                    keep=math.exp(-max(t, MIN_FALL) * fall),
                    selector=draw["selector"],
                    attention_weight=weight,
                    oversample=draw["oversample"],
                )
                for layer, weight, fall in zip(layers[:num_inside], weights, reduction, strict=False)
            ]
            return Plan(stages=tuple(stages))

        return plan


def rescale(plan: Plan) -> Callable[[float], Plan]:
    """Any plan's family: its stages' reductions times t, so t = 1 is the plan itself."""
    reduction: Sequence[float] = [-math.log(max(stage.keep, 1e-6)) for stage in plan.stages]

    def scaled(t: float) -> Plan:
        stages = (
            replace(stage, keep=math.exp(-max(t, MIN_FALL) * fall))
            for stage, fall in zip(plan.stages, reduction, strict=True)
        )
        return replace(plan, stages=tuple(stages))

    return scaled

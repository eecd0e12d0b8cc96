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

__all__ = ["Draw", "SearchSpace", "rescale"]

MIN_FALL = 1e-3  # keep ratios of consecutive stages differ by at least this share
Range = tuple[float, float]
Draw = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Ranges of everything that is searched; see `search_spaces/reference.yaml` for what each means."""

    num_stages: tuple[int, int]
    first_layer: tuple[int, int]
    layer_gap: tuple[int, int]
    shape: Range
    budget: Range
    attention_weight: Range
    attention_step: Range
    oversample: Range
    selectors: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> SearchSpace:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise AutotuneError(f"a search space must be a readable YAML file, got {path}: {error}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(known):
            came = sorted(set(data) ^ set(known)) if isinstance(data, dict) else type(data).__name__
            raise AutotuneError(f"{path}: a search space has exactly {', '.join(known)}; missing or unknown: {came}")
        for name in known[:-1]:
            pair = data[name]
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)):
                raise AutotuneError(f"{path}: {name} must be [low, high], got {pair!r}")
            if pair[0] > pair[1]:
                raise AutotuneError(f"{path}: {name} must rise, got {pair!r}; swap the two numbers")
        return cls(**{name: tuple(value) for name, value in data.items()})

    def suggest(self, ask: Any) -> dict[str, Any]:
        """One draw through `ask.suggest_int/_float/_categorical`; always the same names and ranges."""
        draw: dict[str, Any] = {
            "num_stages": ask.suggest_int("num_stages", *self.num_stages),
            "first_layer": ask.suggest_int("first_layer", *self.first_layer),
            "budget": ask.suggest_float("budget", *self.budget),
            "attention_weight": ask.suggest_float("attention_weight", *self.attention_weight),
            "oversample": ask.suggest_float("oversample", *self.oversample),
            "selector": ask.suggest_categorical("selector", list(self.selectors)),
        }
        for stage in range(self.num_stages[1]):
            draw[f"shape_{stage}"] = ask.suggest_float(f"shape_{stage}", *self.shape)
            if stage:
                draw[f"layer_gap_{stage}"] = ask.suggest_int(f"layer_gap_{stage}", *self.layer_gap)
                draw[f"attention_step_{stage}"] = ask.suggest_float(f"attention_step_{stage}", *self.attention_step)
        return draw

    def schedule(self, draw: Draw, num_layers: int) -> Callable[[float], Plan]:
        """The draw's family of plans: keep_i = exp(-t x (shape_0 + ... + shape_i)), shorter as t rises."""
        layers, weights, reduction = [draw["first_layer"]], [draw["attention_weight"]], [draw["shape_0"]]
        for stage in range(1, draw["num_stages"]):
            layers.append(layers[-1] + draw[f"layer_gap_{stage}"])
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

"""Settings to families of plans, and plans back to settings: pure arithmetic on layers, shares and weights.

A family's plan at t leaves keep ** t of every stage's share, so t is the last stage's reduction in nats where that
stage keeps 1 / e at t = 1, as in `whole_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from autotune.realised import settings_read
from btp.plan import Plan, Stage, round_half_up

__all__ = ["family", "last_fall", "rescale", "settings_of", "whole_plan"]

MIN_FALL = 1e-3  # a family's last stage removes at least this much, in nats
LIFT_FROM, LIFT_UNTIL = math.log(32), 2 * math.log(32)  # between these, in nats, stages move up to the first layer
BEYOND = 2.0  # a depth that no layer has
MOST = 600.0  # nats; exp(-745) is 0


def rescale(plan: Plan) -> Callable[[float], Plan]:
    """Any plan's family: its stages' reductions times t, so t = 1 is the plan itself. What keeps nothing still does."""
    deepest = max((-math.log(stage.keep) for stage in plan.stages if stage.keep), default=0.0)

    def scaled(t: float) -> Plan:
        power = min(max(t, MIN_FALL), MOST / max(deepest, 1.0))
        return replace(plan, stages=tuple(replace(stage, keep=stage.keep**power) for stage in plan.stages))

    return scaled


def family(whole: Plan, at_the_top: str) -> Callable[[float], Plan]:
    """`rescale`, and from ln 32 nats on stages move up as well: proportionally, to the first layers at 2 ln 32.

    at_the_top: the selector of a stage that comes to stand before layer 0.
    """
    scaled = rescale(whole)

    def plan(t: float) -> Plan:
        shrunk = scaled(t)
        if _lift(t) == 1.0:
            return shrunk
        stages: list[Stage] = []
        for stage in shrunk.stages:
            layer = max(stages[-1].layer + 1 if stages else 0, int(stage.layer * _lift(t)))
            selector = stage.selector if layer else at_the_top
            stages.append(replace(stage, layer=layer, selector=selector))
        return replace(shrunk, stages=tuple(stages))

    return plan


def last_fall(stages: Sequence[Stage]) -> float:
    """The reduction, in nats, of the last stage that keeps any: where in its family a plan with these stages is."""
    return max((-math.log(stage.keep) for stage in stages if stage.keep), default=0.0)


def whole_plan(settings: Mapping[str, Any], num_layers: int) -> Plan:
    """The family's plan at t = 1, where the last stage keeps 1 / e. Settings: a draw's, and the constants."""
    before = [Stage(layer=0, keep=1.0, selector=settings["selector_before"])] if settings["before"] else []
    layers = _inside_layers(settings, num_layers)
    inside = [
        Stage(
            layer=layer,
            keep=1.0,
            selector=_own(settings, "selector", index),
            attention_weight=weight,
            oversample=_own(settings, "oversample", index),
            attention=settings["attention"],
            seeds=0.0 if index else settings["seeds"],
        )
        for index, (layer, weight) in enumerate(zip(layers, _weights(settings, len(layers)), strict=True))
    ]
    shapes = [1.0] * len(before) + [settings[f"shape_{index}"] for index in range(len(inside))]
    stages = [
        replace(stage, keep=math.exp(-fall / sum(shapes)))
        for stage, fall in zip((*before, *inside), accumulate(shapes), strict=True)
    ]
    final = round_half_up(settings["final_layer"] * num_layers)
    if settings["final_drop"] and stages[-1].layer < final < num_layers:
        stages.append(Stage(layer=final, keep=0.0))
    return Plan(stages=tuple(stages), positions=settings["positions"])


def settings_of(plan: Plan, num_layers: int, middle_shape: float | None = None) -> dict[str, Any]:
    """Settings whose family would hold the plan if their ranges had no ends and no selector were forbidden anywhere.

    Those that the plan does not tell are left out. The first stage's shape is 1; with a `middle_shape`, where it stands
    inside the decoder, the middle of all shapes is that instead.
    """
    final = plan.stages[-1] if plan.stages and plan.stages[-1].keep == 0 else None
    keeping = [stage for stage in plan.stages if stage.keep]
    before = [stage for stage in keeping if stage.layer == 0]
    inside = keeping[len(before) :]
    lift = _lift(last_fall(keeping))
    deepest = range(num_layers - len(inside), num_layers)
    layers = [min(math.ceil(stage.layer / lift), d) for stage, d in zip(inside, deepest, strict=True)] if lift else []
    found: dict[str, Any] = {"num_stages": len(inside), "before": bool(before), "positions": plan.positions}
    found["final_drop"] = final is not None
    found["final_layer"] = math.ceil(final.layer / lift) / num_layers if final is not None and lift else BEYOND
    if before:
        found["selector_before"] = before[0].selector
    if layers:
        found["first_layer"] = (layers[0] - 0.5) / max(num_layers - 1, 1)
    found |= {f"layer_gap_{i}": (b - a) / num_layers for i, (a, b) in enumerate(pairwise(layers), start=1)}
    falls = [0.0, *(-math.log(stage.keep) for stage in keeping)]
    steps = [max(below - above, 1e-9) for above, below in pairwise(falls)] or [1.0]
    unit = steps[0] if before or not middle_shape else math.sqrt(min(steps) * max(steps)) / middle_shape
    found |= {f"shape_{i}": step / unit for i, step in enumerate(steps[len(before) :])}
    return found | _selection_settings(inside)


def _selection_settings(inside: Sequence[Stage]) -> dict[str, Any]:
    """How the stages inside the decoder choose: names of one setting for all of them, and of one for each."""
    found: dict[str, Any] = {}
    for index, stage in reversed(list(enumerate(inside))):  # so that the first one's stand for all
        read = settings_read(stage.selector)
        own: dict[str, Any] = {"selector": stage.selector}
        own |= {name: getattr(stage, name) for name in ("attention_weight", "oversample") if name in read}
        found |= {f"{name}_{index}": value for name, value in own.items()} | own
        if "attention" in read:
            found["attention"] = stage.attention
    if inside and "seeds" in settings_read(inside[0].selector):
        found["seeds"] = inside[0].seeds
    weight = found.get("attention_weight", 0.0)
    for index in range(1, len(inside)):
        own_weight = found.get(f"attention_weight_{index}", weight)
        found[f"attention_step_{index}"], weight = own_weight - weight, own_weight
    return found


def _inside_layers(settings: Mapping[str, Any], num_layers: int) -> list[int]:
    """Where stages stand inside the decoder: one at least where none stands before it, none past the last layer."""
    num_inside = settings["num_stages"] or int(not settings["before"])
    layers = [min(1 + int(settings["first_layer"] * (num_layers - 1)), num_layers - 1)] if num_inside else []
    for index in range(1, num_inside):
        layers.append(layers[-1] + max(1, round_half_up(settings[f"layer_gap_{index}"] * num_layers)))
    return [layer for layer in layers if layer < num_layers]


def _weights(settings: Mapping[str, Any], num_stages: int) -> list[float]:
    if "attention_weight_0" in settings:
        return [settings[f"attention_weight_{index}"] for index in range(num_stages)]
    steps = [settings[f"attention_step_{index}"] for index in range(1, num_stages)]
    return list(accumulate(steps, lambda weight, step: min(1.0, weight + step), initial=settings["attention_weight"]))[
        :num_stages
    ]


def _own(settings: Mapping[str, Any], name: str, index: int) -> Any:
    return settings[name] if name in settings else settings[f"{name}_{index}"]


def _lift(t: float) -> float:
    """What remains of every layer's depth at t nats."""
    return min(1.0, max(0.0, (LIFT_UNTIL - t) / (LIFT_UNTIL - LIFT_FROM)))
